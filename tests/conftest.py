import logging

import torch

torch.set_num_threads(1)
torch._dynamo.config.fake_tensor_cache_enabled = False  # in nets as small as these it costs a fifth of a trace
logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # else thousands of lines beside each failure
