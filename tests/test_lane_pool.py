"""Streams that join and leave a pool of lanes, on PyTorch and on ONNX Runtime."""

import gc
import random
import threading
import weakref

import pytest
import torch
from torch import nn

import cofx
from cofx.runtime import LanePool, OnnxStep, PoolFull


class Net(nn.Module):
    """(batch, 2, T), (batch, 2, 2T) and an offset (batch, 2) without time -> (batch, 3, T/2), and the slow input."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Conv1d(2, 3, 4, stride=4, padding=1)
        self.slow = nn.Conv1d(2, 3, 3, stride=2, padding=1)
        self.memory = nn.GRU(3, 3, batch_first=True)

    def forward(self, slow: torch.Tensor, fast: torch.Tensor, offset: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.slow(slow + offset[:, :, None])
        return {"y": self.memory((y + self.fast(fast)).mT)[0].mT, "slow": slow.tanh()}


def inputs(steps: int, seed: int, batch: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, *t, generator=g) for t in ((steps,), (2 * steps,), ())]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    with torch.no_grad():
        step = cofx.compile(Net().eval(), tuple(inputs(12, 0, 2)), time_dim=(2, 2, None))
        path = tmp_path_factory.mktemp("pool") / "step.onnx"
        step.to_onnx(path, frames_per_step=4)
    return step, path


@pytest.fixture(params=["torch", "onnx"])
def pool(request, files):
    step, path = files
    return LanePool(step, 5) if request.param == "torch" else LanePool(OnnxStep(path), 5)


def given(pool, chunks):
    """Chunks without batch dimension, as the pool's step takes them."""
    return [x[0].numpy() if isinstance(pool.step, OnnxStep) else x[0] for x in chunks]


class Fed:
    """A stream with what it is still to be fed, and what came out."""

    def __init__(self, pool, steps: int, seed: int) -> None:
        self.pool, self.steps, self.seed, self.at = pool, steps, seed, 0
        self.clips, self.stream = inputs(steps, seed), pool.open()
        self.got: dict[str, list[torch.Tensor]] = {"y": [], "slow": []}

    def feed(self, n: int) -> None:
        n = min(n, self.steps - self.at)
        slow, fast, offset = self.clips
        part = [slow[:, :, self.at : self.at + n], fast[:, :, 2 * self.at : 2 * (self.at + n)], offset.clone()]
        self.stream.feed(*given(self.pool, part))
        for x in part:
            x[...] = 7  # the caller's own again
        self.at += n
        if self.at == self.steps:
            self.stream.close()

    def take(self, y) -> None:
        for k, frames in y.items():
            if frames is not None:
                self.got[k].append(torch.as_tensor(frames).clone())

    def check(self, model: nn.Module) -> None:
        expected = model(*inputs(self.steps, self.seed))
        for k, parts in self.got.items():
            torch.testing.assert_close(torch.cat(parts, 1), expected[k][0], rtol=1e-4, atol=1e-5)


def churn(pool, model: nn.Module, streams: int, seed: int = 0) -> None:
    """Open, feed at random and close so many streams; each gets what the model gives on it alone."""
    rng, live, opened, done = random.Random(seed), {}, 0, 0
    while done < streams:
        while opened < streams and len(live) < pool.capacity and rng.random() < 0.7:
            fed = Fed(pool, 2 * rng.randint(1, 6), opened)
            live[fed.stream] = fed
            opened += 1
        for fed in live.values():
            if not fed.stream.closed and rng.random() < 0.7:
                fed.feed(rng.randint(1, 9))
        for stream, y in pool.run():
            live[stream].take(y)
        for stream in [s for s in live if s.closed and not s.open]:
            live.pop(stream).check(model)
            done += 1


def test_random_streams(pool, files) -> None:
    churn(pool, files[0].model, 60)
    assert len(pool) == 0 and pool.waiting == 0 and pool.run() == []


@pytest.mark.slow
def test_ten_thousand_streams(files) -> None:
    """Nothing leaks and nothing is mixed."""
    step, path = files
    for pool in (LanePool(step, 64), LanePool(OnnxStep(path), 64)):
        churn(pool, step.model, 10_000)
        gc.collect()
        assert len(pool) == 0 and sorted(pool._free) == list(range(64))


def test_streams_are_let_go(pool) -> None:
    fed = Fed(pool, 8, 0)
    seen = weakref.ref(fed.stream)
    fed.feed(8)
    while pool.waiting:
        pool.run()
    del fed
    gc.collect()
    assert seen() is None


def test_a_full_pool_says_so(pool) -> None:
    streams = [pool.open() for _ in range(5)]
    with pytest.raises(PoolFull, match="all 5 lanes"):
        pool.open()
    streams[2].close()
    assert pool.open() is not streams[2] and len(pool) == 5


def test_closing_without_flush(pool, files) -> None:
    fed = Fed(pool, 8, 0)
    fed.feed(6)
    pool.run()
    fed.stream.close(flush=False)
    assert len(pool) == 0 and pool.run() == []
    with pytest.raises(cofx.InputError, match="closed"):
        fed.feed(2)
    churn(pool, files[0].model, 10)


def test_bad_frames(pool) -> None:
    stream = pool.open()
    good = given(pool, inputs(4, 0))
    for bad, words in [
        (good[:2], "3 inputs are needed"),
        ([good[0], good[1][:, :6], good[2]], "different numbers"),
        ([good[0][:1], *good[1:]], "expected float32"),
        ([good[0], good[1], good[2][None]], "'offset' is"),
        ([None, *good[1:]], "'slow' is a NoneType, not a"),
        ([x.tolist() for x in good], "'slow' is a list, not a"),
        ([good[0].astype(float) if hasattr(good[0], "astype") else good[0].double(), *good[1:]], "float64"),
    ]:
        with pytest.raises(cofx.InputError, match=words):
            stream.feed(*bad)
    assert stream.waiting == 0
    for capacity in (0, "4"):
        with pytest.raises(cofx.InputError, match="number of lanes"):
            LanePool(pool.step, capacity)
    with pytest.raises(cofx.InputError, match="a pool takes .* not Net"):
        LanePool(Net(), 4)
    with pytest.raises(cofx.InputError, match="multiple of"):
        LanePool(pool.step, 2, frames_per_step=3)


def test_a_step_that_raises_loses_nothing(pool, files, monkeypatch) -> None:
    fed = Fed(pool, 8, 3)
    fed.feed(8)
    call = pool._layout.call
    object.__setattr__(pool._layout, "call", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        pool.run()
    object.__setattr__(pool._layout, "call", call)
    while pool.waiting:
        for _, y in pool.run():
            fed.take(y)
    fed.check(files[0].model)


def test_the_step_model_is_the_pools_alone(pool) -> None:
    """Streams of two pools would share lanes: whoever comes second is told, and nothing is handed out."""
    fed = Fed(pool, 16, 0)
    fed.feed(8)
    pool.run()
    other = LanePool(pool.step, 2)
    with pytest.raises(cofx.InputError, match="called past the pool"):
        pool.run()
    Fed(other, 8, 0).feed(8)
    other.run()
    chunks = [x.numpy() if isinstance(pool.step, OnnxStep) else x for x in inputs(4, 0, 2)]
    pool.step.forward_steps(*chunks, ready=[True, True], update_state=False)  # a look moves nothing
    other.run()
    pool.step.forward_steps(*chunks, ready=[True, True])
    Fed(other, 8, 0).feed(8)
    with pytest.raises(cofx.InputError, match="called past the pool"):
        other.run()


def test_threads(pool, files) -> None:
    """Streams fed from several threads while another runs the pool."""
    errors, results, stop = [], {}, threading.Event()

    def producer(seed: int) -> None:
        try:
            rng = random.Random(seed)
            for n in range(8):
                fed = None
                while fed is None:
                    try:
                        fed = Fed(pool, 2 * rng.randint(1, 6), 100 * seed + n)
                    except PoolFull:
                        stop.wait(0.001)
                results[fed.stream] = fed
                while not fed.stream.closed:
                    fed.feed(rng.randint(1, 4))
                while fed.stream.open:
                    stop.wait(0.001)
        except Exception as error:
            errors.append(error)

    def runner() -> None:
        with torch.no_grad():
            while not stop.is_set():
                for stream, y in pool.run():
                    while stream not in results:
                        stop.wait(0.001)
                    results[stream].take(y)

    threads = [threading.Thread(target=producer, args=(i,)) for i in range(4)]
    driver = threading.Thread(target=runner)
    for t in (*threads, driver):
        t.start()
    for t in threads:
        t.join(120)
    stop.set()
    driver.join(10)
    assert not errors and len(results) == 32 and len(pool) == 0
    with torch.no_grad():
        for fed in results.values():
            fed.check(files[0].model)


def test_a_stream_past_a_table_fails_alone() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[:, : x.shape[2]]

    x = torch.randn(1, 3, 12)
    pool = LanePool(cofx.compile(Table(), x), 3)
    long, short = pool.open(), pool.open()
    long.feed(torch.zeros(3, 50))
    for _ in range(40):
        assert [s for s, _ in pool.run()] == [long]
    short.feed(x[0])
    assert [s for s, _ in pool.run()] == [short]
    assert long.error is not None and len(pool) == 1
    with pytest.raises(cofx.InputError, match="40 entries"):
        long.feed(torch.zeros(3, 1))


class Growing(nn.Module):
    """(batch, 3, T): attention over all frames so far, which are kept, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.heads = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(self.conv(x)).mT.chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).mT


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_histories_that_grow(runtime: str, tmp_path) -> None:
    """Streams of many lengths, each at its own place: the room grows while others go on, and after they have left."""
    torch.manual_seed(0)
    step = cofx.compile(Growing().eval(), torch.randn(2, 3, 12))
    step.to_onnx(tmp_path / "step.onnx", longest=80)
    onnx = runtime == "onnx"
    pool = LanePool(OnnxStep(tmp_path / "step.onnx") if onnx else step, 3)
    rng, live, done = random.Random(0), {}, 0
    while done < 12:
        while len(live) < 3 and rng.random() < 0.8:
            x = torch.randn(3, rng.choice((1, 5, 17, 40, 75)))
            live[pool.open()] = (x, [], [0])
        for stream, (x, _, at) in live.items():
            if not stream.closed and rng.random() < 0.8:
                chunk = x[:, at[0] : at[0] + rng.randint(1, 20)]
                stream.feed(chunk.numpy() if onnx else chunk)
                at[0] += chunk.shape[1]
                if at[0] == x.shape[1]:
                    stream.close()
        for _ in range(rng.randint(1, 20)):
            for stream, y in pool.run():
                live[stream][1].append(torch.as_tensor(y))
        for stream in [s for s in live if s.closed and not s.open]:
            x, parts, _ = live.pop(stream)
            torch.testing.assert_close(torch.cat(parts, 1), step.model(x[None])[0], rtol=1e-4, atol=1e-5)
            done += 1
