"""What holds for every test: one thread, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402  the variables must be set before transformers is imported anywhere

torch.set_num_threads(1)
