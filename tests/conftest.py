"""What holds for every test: one thread, no network."""

from __future__ import annotations

import os

# Before transformers is imported anywhere, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)
