"""Settings of every test run."""

import torch

# Tests work on tiny tensors, where handing work to a second thread costs more than the work.
torch.set_num_threads(1)
