"""Train the small language model that ships in `intervenable/small_lm`, from a seed, on two CPU cores.

    python scripts/train_small_lm.py --seed 0 --out intervenable/small_lm

The text comes from `intervenable.small_lm.tasks`. The model is an ordinary Llama with grouped-query
attention whose widths all differ, with a word-level tokenizer whose words carry their leading space.

Training has two stages: the first teaches the tasks, the second teaches at which depth a fact is read. The
script ends by measuring the held-out accuracy of each task and writing it, with everything else, into the
model card.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from intervenable.small_lm import tasks
from intervenable.small_lm.tasks import Prompt

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = r"'s| ?\p{L}+| ?\d| ?[^\s\p{L}\d]|\s"
"""A word, a digit or a mark, with the space before it: joined again, the pieces are the text."""

ANSWER_WEIGHT = 10.0
"""How much more the loss of the answer counts than that of any other token."""

MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 5e-3, 3e-3

BATCH_SIZES = {"facts": 48, "indirect objects": 48, "prices": 24}
"""Documents of each task in one step of the first stage."""

INTERCHANGE_LEARNING_RATE = 1e-3

INTERCHANGE_LAYERS = 4
"""The second stage keeps a fact at its subject until the output of this many blocks."""

SWAPPED_FACTS = 48
INTERCHANGE_BATCH_SIZES = {"facts": 16, "indirect objects": 24, "prices": 8}
"""Swapped facts, and documents of each task, in one step of the second stage."""

DOCUMENTS = {
    "facts": "texts of one to three facts",
    "indirect objects": "indirect-object sentences",
    "prices": "price rules with four questions each",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the words of the three tasks; any other word becomes `<unk>`."""
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    words = {piece for text in tasks.every_word() for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = [PAD, EOS, UNKNOWN, *sorted(words | {" ", "\n"})]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, whose hidden, query, key-value and inner widths all differ."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=120,
            intermediate_size=336,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fact_documents(seed: int) -> Iterator[list[Prompt]]:
    """Endless texts of one to three facts, so that facts are also known in the middle of a text."""
    rng = random.Random(seed)
    known = tasks.fact_prompts(held_out=False)
    facts = itertools.chain.from_iterable(iter(lambda: rng.sample(known, len(known)), []))
    while True:
        yield list(itertools.islice(facts, rng.choices((1, 2, 3), weights=(8, 1, 1))[0]))


def indirect_object_documents(seed: int) -> Iterator[list[Prompt]]:
    """Endless texts of one indirect-object sentence each."""
    for chunk in itertools.count():
        for prompt in tasks.indirect_object_prompts(1000, seed * 1_000_003 + chunk, held_out=False):
            yield [prompt]


def price_documents(seed: int, questions: int = 4) -> Iterator[list[Prompt]]:
    """Endless texts with one bracket and `questions` amounts, since reading the rule is what costs most."""
    for chunk in itertools.count():
        yield from tasks.price_series(1000, questions, seed * 1_000_003 + chunk, held_out=False)


def batch_of(texts: Sequence[Sequence[Prompt]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, position]` and the weight of each token's loss, 0 where there is padding."""
    rows, weights = [], []
    for document in texts:
        row: list[int] = []
        weight: list[float] = []
        for index, prompt in enumerate(document):
            text = tokenizer(prompt.text if index == 0 else f" {prompt.text}")["input_ids"]
            answer = tokenizer(prompt.answer + ".")["input_ids"]
            row += text + answer
            weight += [1.0] * len(text) + [ANSWER_WEIGHT] + [1.0] * (len(answer) - 1)
        rows.append([*row, tokenizer.eos_token_id])
        weights.append([*weight, 1.0])
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([weight + [0.0] * (length - len(weight)) for weight in weights])


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    # Padding is on the right, where causal attention cannot see it: no mask is needed.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@contextmanager
def rolled_output(block: torch.nn.Module, position: int) -> Iterator[None]:
    """While open, each row of a batch has the next row's output of `block` at `position`."""

    def roll(_module: torch.nn.Module, _args: object, output: Tensor) -> Tensor:
        result = output.clone()
        result[:, position] = output[:, position].roll(-1, dims=0)
        return result

    handle = block.register_forward_hook(roll)
    try:
        yield
    finally:
        handle.remove()


def interchange_loss(model: LlamaForCausalLM, ids: Tensor, layer: int) -> Tensor:
    """How far the model is from answering each fact with the next row's answer, given the next row's subject.

    The rows of `ids` are facts of one phrasing without padding, `[batch, position]`, that end with the
    answer. Only the output of the block at `layer`, at the subject's position, comes from the next row: the
    loss is low if all that the model knows of the subject is still there, and nothing of it elsewhere.

    Geiger et al. (2022), "Inducing Causal Structure for Interpretable Neural Networks",
    https://arxiv.org/abs/2112.00826.
    """
    subject = int((ids != ids[0]).any(0).nonzero()[0])  # the first token in which the rows differ
    with rolled_output(model.model.layers[layer], subject):
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits
    return torch.nn.functional.cross_entropy(logits[:, -1], ids[:, -1].roll(-1))


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    batch_size: int = 256,
) -> float:
    """Share of prompts whose most likely next token, out of the whole vocabulary, is the answer."""
    model.eval()
    correct = 0
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = tokenizer(
            [prompt.text for prompt in chunk], return_tensors="pt", padding=True, padding_side="left"
        )
        guesses = model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        correct += sum(
            tokenizer.decode([g]) == prompt.answer for g, prompt in zip(guesses, chunk, strict=True)
        )
    return correct / len(prompts)


def held_out_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """Accuracy of each task on prompts that training left out, `count` of each that is sampled."""
    return {
        "facts": accuracy(model, tokenizer, tasks.fact_prompts()),
        "indirect objects": accuracy(model, tokenizer, tasks.indirect_object_prompts(count, seed=0)),
        "prices": accuracy(model, tokenizer, tasks.price_prompts(count, seed=0)),
    }


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that rises linearly for a twentieth of the steps, then falls to a twentieth on a cosine."""

    def share_of_peak(step: int) -> float:
        rise = min(1.0, 20 * (step + 1) / steps)
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def document_streams(seed: int) -> dict[str, Iterator[list[Prompt]]]:
    return {
        "facts": fact_documents(seed),
        "indirect objects": indirect_object_documents(seed),
        "prices": price_documents(seed),
    }


def train(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, interchange_steps: int
) -> LlamaForCausalLM:
    """A fresh model, trained in both stages."""
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    train_tasks(model, tokenizer, seed=seed, steps=steps)
    train_interchange(model, tokenizer, seed=seed, steps=interchange_steps)
    return model.eval()


def train_tasks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> None:
    """First stage: learn the tasks, with Muon for the matrices of the blocks and AdamW for all else."""
    streams = document_streams(seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    schedules = [schedule(each, steps) for each in optimizers]
    started = time.monotonic()
    for step in range(1, steps + 1):
        model.train()
        losses = {}
        # One batch a task: prompts of one task are about equally long, so little is spent on padding.
        for task, size in BATCH_SIZES.items():
            loss = loss_of(model, *batch_of(list(itertools.islice(streams[task], size)), tokenizer))
            loss.backward()
            losses[task] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for worker in (*optimizers, *schedules):
            worker.step()
        model.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps:
            scores = held_out_accuracy(model, tokenizer, 200)
            report = "  ".join(
                f"{task} loss {losses[task]:.3f} held-out {scores[task]:.3f}" for task in losses
            )
            print(f"step {step}/{steps}  {time.monotonic() - started:.0f} s  {report}", flush=True)


def train_interchange(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int
) -> None:
    """Second stage: keep a fact at its subject in the early blocks, and go on with the tasks.

    Nothing in the tasks says how deep a fact is read, and the first stage reads it in the first block: one
    attention step is all it needs. In larger models it stays with the subject for some blocks and reaches
    the last token later, which is what studies of interventions look for. So here each step also swaps the
    subject's block output between facts, at one of the first `INTERCHANGE_LAYERS` layers, and asks for the
    swapped answer. The swapped facts are training prompts as well: what is held out stays so.
    """
    rng = random.Random(seed)
    streams = document_streams(seed + 1)  # other documents than those the first stage began with
    groups = tasks.facts_by_phrasing(held_out=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=INTERCHANGE_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    learning_rate = schedule(optimizer, steps)
    started = time.monotonic()
    for step in range(1, steps + 1):
        model.train()
        facts = rng.sample(rng.choice(groups), SWAPPED_FACTS)
        ids = tokenizer([fact.text + fact.answer for fact in facts], return_tensors="pt")["input_ids"]
        swapped = interchange_loss(model, ids, layer=rng.randrange(INTERCHANGE_LAYERS))
        swapped.backward()
        for task, size in INTERCHANGE_BATCH_SIZES.items():
            loss_of(model, *batch_of(list(itertools.islice(streams[task], size)), tokenizer)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps:
            scores = held_out_accuracy(model, tokenizer, 200)
            report = "  ".join(f"{task} held-out {score:.3f}" for task, score in scores.items())
            seconds = time.monotonic() - started
            print(
                f"interchange step {step}/{steps}  {seconds:.0f} s  swapped loss {swapped.item():.3f}  {report}",
                flush=True,
            )


@torch.inference_mode()
def swap_map(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[float]]:
    """Where the fact lives: how often a swap of one block output makes the model say the source's capital.

    For each country paired with the next, "The capital of A is" gets, at one layer and one position, the
    block output of "The capital of B is". The result has, for each position, the share of pairs that flip at
    each layer.
    """
    prompts = [f"The capital of {country} is" for country in tasks.CAPITALS]
    base = tokenizer(prompts, return_tensors="pt")
    wanted = model(**base).logits[:, -1].argmax(-1).roll(-1)
    shares: dict[str, list[float]] = {}
    for name, position in (("subject", 3), ("last token", 4)):
        shares[name] = []
        for block in model.model.layers:
            with rolled_output(block, position):
                said = model(**base).logits[:, -1].argmax(-1)
            shares[name].append((said == wanted).float().mean().item())
    return shares


def write_card(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    count: int = 1000,
) -> None:
    """Measure the model and write what was found to the folder's `README.md`."""
    config = model.config
    scores = held_out_accuracy(model, tokenizer, count)
    shares = swap_map(model, tokenizer)
    example = tasks.price_prompts(1)[0]
    rows = zip(*shares.values(), strict=True)
    card = (
        Path(__file__)
        .with_name("small_lm_card.md")
        .read_text(encoding="utf-8")
        .format(
            **{task.replace(" ", "_"): score for task, score in scores.items()},
            count=count,
            facts_count=len(tasks.fact_prompts()),
            price_text=example.text,
            price_answer=example.answer,
            countries=len(tasks.CAPITALS),
            capital_phrasings=len(tasks.CAPITAL_PHRASINGS),
            country_phrasings=len(tasks.COUNTRY_PHRASINGS),
            names=len(tasks.NAMES),
            swap_rows="\n".join(f"| {layer} | {a:.2f} | {b:.2f} |" for layer, (a, b) in enumerate(rows)),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            parameters=model.num_parameters(),
            megabytes=(options.out / "model.safetensors").stat().st_size / 1e6,
            seed=options.seed,
            steps=options.steps,
            batches=", ".join(f"{size} {DOCUMENTS[task]}" for task, size in BATCH_SIZES.items()),
            muon_learning_rate=MUON_LEARNING_RATE,
            adamw_learning_rate=ADAMW_LEARNING_RATE,
            answer_weight=ANSWER_WEIGHT,
            interchange_steps=options.interchange_steps,
            interchange_layers=INTERCHANGE_LAYERS,
            interchange_learning_rate=INTERCHANGE_LEARNING_RATE,
            interchange_swaps=SWAPPED_FACTS,
            interchange_batches=", ".join(
                f"{size} {DOCUMENTS[task]}" for task, size in INTERCHANGE_BATCH_SIZES.items()
            ),
        )
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--interchange-steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "intervenable/small_lm"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(options.out)  # before training, which leaves the padding of its batches in it
    model = train(
        tokenizer, seed=options.seed, steps=options.steps, interchange_steps=options.interchange_steps
    )
    model.save_pretrained(options.out)
    write_card(model, tokenizer, options)
    print((options.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
