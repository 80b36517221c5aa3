import logging

import torch

torch.set_num_threads(1)
logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # else thousands of lines beside each failure
