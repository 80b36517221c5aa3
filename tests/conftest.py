import functools
import logging

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

torch.set_num_threads(1)
torch._dynamo.config.fake_tensor_cache_enabled = False  # in nets as small as these it costs a fifth of a trace
logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # else thousands of lines beside each failure
# the forms that ops have in ONNX are gathered once; torch does so for each file that it writes, a fifth of the time
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
