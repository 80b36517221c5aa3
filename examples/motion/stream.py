"""Stream the test recordings through the trained model, frame by frame, as a watch would send them.

Prints one line per second of signal while frames arrive, then compares with the offline model (difference over the
whole stream) and with a sliding window (time per frame, one thread). Fails where the numbers differ.
"""

import argparse
import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
from data import ACTIVITIES, RATE, Stream, join_recordings, load_recordings
from model import load_model
from torch import Tensor, nn

import cofx


def play(step: cofx.StepModule, stream: Stream, seconds: int, pace: float) -> Tensor:
    """Feed the stream one frame at a time and print the prediction once a second.

    Args:
        step: The step model.
        stream: T frames.
        seconds: How much of the stream to print, in seconds of signal; the rest is streamed silently.
        pace: Frames per second, or 0 for as fast as it goes.

    Returns:
        Every frame's logits, flush included, `(1, classes, T)`.
    """
    outputs: list[Tensor] = []
    print(f"{'received':>10}{'predicted':>11}   {'activity':<12}{'prediction':<12}confidence")
    for received, frame in enumerate(stream.signal.unbind(dim=-1), start=1):
        if pace:
            time.sleep(1 / pace)
        logits = step.forward_step(frame)
        if logits is not None:
            outputs.append(logits)
        if received % RATE == 0 and received <= seconds * RATE:
            print_second(received, outputs, stream.labels)
    print(f"... {stream.signal.shape[-1] / RATE:.0f} s in all, the rest is not printed\n")
    return torch.cat([torch.stack(outputs, dim=-1), step.flush()], dim=-1)


def print_second(received: int, outputs: list[Tensor], labels: Tensor) -> None:
    """One line: how much was received, and the newest prediction beside what was really done at that frame."""
    arrived = f"{received / RATE:8.1f} s"
    if not outputs:
        print(f"{arrived}          -", flush=True)
        return
    confidence, guess = outputs[-1][0].softmax(dim=0).max(dim=0)
    truth = int(labels[0, len(outputs) - 1])
    bar = "#" * round(20 * confidence.item())
    remark = "" if guess == truth else "  <- differs"
    names = f"{ACTIVITIES[truth]:<12}{ACTIVITIES[int(guess)]:<12}"
    print(f"{arrived}{len(outputs) / RATE:9.1f} s   {names}{bar:<20} {confidence:4.0%}{remark}", flush=True)


def time_per_frame(calls: dict[str, Callable[[], object]], rounds: int = 60, repeats: int = 20) -> dict[str, float]:
    """Median time of each call in microseconds; the calls take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: median(values) for name, values in times.items()}


def compare_speed(step: cofx.StepModule, model: nn.Module, signal: Tensor, offline: Tensor) -> tuple[float, float]:
    """Time per frame of the step model and of a sliding window, in microseconds.

    The window is as long as the receptive field, so that it gives the same logits for the frame `delay` before its
    last one; that is checked on the first 200 windows.

    Args:
        step: The step model; its state is cleaned first.
        model: The model that it was compiled from.
        signal: `(1, sensors, T)`.
        offline: `model(signal)`, `(1, classes, T)`.
    """
    length, centre = int(step.receptive_field), int(step.receptive_field - 1 - step.delay)
    windows = signal.unfold(-1, length, 1).unbind(dim=2)
    windowed = torch.stack([model(window)[..., centre] for window in windows[:200]], dim=-1)
    torch.testing.assert_close(windowed, offline[..., centre : centre + 200], rtol=1e-4, atol=1e-5)

    step.clean_state()
    frames, clips = cycle(signal.unbind(dim=-1)), cycle(windows)
    times = time_per_frame(
        {"step": lambda: step.forward_step(next(frames)), "window": lambda: model(next(clips))[..., centre]}
    )
    return times["step"], times["window"]


@torch.no_grad()
def main() -> None:
    """Compile, stream, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="seconds of signal to print (default: 60)")
    parser.add_argument("--pace", type=float, default=0, help="frames per second, 10 is real time (default: no wait)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    model = load_model()
    stream = join_recordings(load_recordings("TEST"))
    start = time.perf_counter()
    step = cofx.compile(model, stream.signal[..., :100], time_dim=2)
    print(f"compiled in {time.perf_counter() - start:.1f} s: equivalence {step.equivalence}, ", end="")
    print(f"receptive field {step.receptive_field} frames, delay {step.delay} frames ({step.delay / RATE:.1f} s)\n")

    streamed = play(step, stream, options.seconds, options.pace)
    offline = model(stream.signal)
    right = (streamed.argmax(dim=1) == stream.labels).float().mean()
    difference = (streamed - offline).abs().max()
    print(f"predictions         {right:.1%} of {offline.shape[-1]} frames right")
    print(f"largest difference  {difference:.1e} from the offline model, whose logits reach {offline.abs().max():.1f}")
    torch.testing.assert_close(streamed, offline, rtol=1e-4, atol=1e-5)

    step_time, window_time = compare_speed(step, model, stream.signal, offline)
    print(f"sliding window      {window_time:.0f} us per frame, {step.receptive_field} frames at a time")
    print(f"cofx step           {step_time:.0f} us per frame, {window_time / step_time:.1f} times as fast")


if __name__ == "__main__":
    main()
