"""A run's folder: what `train` and `heal` make of a recipe, from corpus to checkpoint.

Knows files, the progress line and the order of things; the arithmetic is elsewhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decoding.devices import pick_device
from training.corpus import END_OF_TEXT, Corpus, Windows, encode, read_corpus, train_tokenizer
from training.evaluation import evaluate
from training.recipe import Architecture, Data, Recipe, RecipeError
from training.trainer import Step, Trainer

_EVALUATED_WINDOWS: Final = 64
_EVALUATED_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a command line adds to a recipe: where, on what, and how far this time."""

    folder: Path
    device: str = "auto"
    num_threads: int | None = None
    until: int | None = None
    save_every: int = 100


def usual_folder(recipe: Recipe) -> Path:
    """Where a run is kept if the command line names no place."""
    return Path("runs") / recipe.name


@dataclass(frozen=True, slots=True)
class TextSource:
    """What texts are made from: data, and the model that is healed, by a hash of its files."""

    data: Data
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """The corpus as ids, and what it was made of."""

    tokenizer: PreTrainedTokenizerFast
    training_ids: NDArray[np.uint32]
    held_out_ids: NDArray[np.uint32]
    bytes_per_token: float
    """Of the held-out text."""
    sources: tuple[tuple[str, str, int], ...]


def train(recipe: Recipe, options: RunOptions) -> Path:
    """Make a checkpoint from scratch; returns its folder. Goes on where an earlier run of the folder stopped."""
    if recipe.architecture is None:
        raise RecipeError(f"recipe {recipe.name}: architecture is missing; `train` makes a model of it")
    accelerator = make_accelerator(options)
    source = TextSource(recipe.data)
    texts = kept_texts(options.folder, source)
    if texts is None:
        corpus = read_corpus(recipe.data)
        texts = keep_texts(corpus, _new_tokenizer(corpus, recipe), options.folder, source)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.architecture, len(texts.tokenizer))
    trainer = Trainer(
        recipe, model, Windows(texts.training_ids, recipe.seed), options.folder, accelerator=accelerator
    )
    follow(trainer, options)
    return finish(model, texts, trainer, options)


def new_model(sizes: Architecture, vocab_size: int) -> LlamaForCausalLM:
    """A fresh Llama model. Outputs of each layer start small, so that depth does not drown the embedding."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.model_width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_width,
        max_position_embeddings=sizes.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=sizes.is_head_tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    shrink = 1 / math.sqrt(2 * sizes.num_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(shrink)
            layer.mlp.down_proj.weight.mul_(shrink)
    return model


def kept_texts(folder: Path, source: TextSource) -> Texts | None:
    """What an earlier run of the folder read and tokenised. Raises RecipeError if it was from something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"{folder}: cannot be a run's folder: {error.strerror}; pass another --out"
        ) from error
    kept = folder / "texts"
    about = kept / "about.json"
    if not about.is_file():
        return None
    known = json.loads(about.read_text(encoding="utf-8"))
    if "data" in known and TextSource(Data.model_validate(known["data"]), known["model"]) != source:
        raise RecipeError(f"{folder}: was begun with other data or another model; pass another --out")
    return Texts(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(kept),
        training_ids=np.load(kept / "training.npy"),
        held_out_ids=np.load(kept / "held_out.npy"),
        bytes_per_token=known["bytes_per_token"],
        sources=tuple(tuple(source) for source in known["sources"]),
    )


def keep_texts(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, folder: Path, source: TextSource) -> Texts:
    """Tokenise the corpus and keep it beside the run, so that a run that goes on sees the same."""
    kept = folder / "texts"
    about = kept / "about.json"
    kept.mkdir(parents=True, exist_ok=True)
    texts = _encoded(corpus, tokenizer)
    tokenizer.save_pretrained(kept)
    np.save(kept / "training.npy", texts.training_ids)
    np.save(kept / "held_out.npy", texts.held_out_ids)
    about.write_text(
        json.dumps(
            {
                "bytes_per_token": texts.bytes_per_token,
                "sources": texts.sources,
                "data": source.data.model_dump(mode="json"),
                "model": source.model,
            }
        ),
        encoding="utf-8",
    )
    return texts


def follow(trainer: Trainer, options: RunOptions) -> None:
    """Resume, and run on with a progress line and a log of every step."""
    num_steps = trainer.recipe.num_steps
    until = min(num_steps, options.until if options.until is not None else num_steps)
    resumed = trainer.resume()
    if trainer.next_step > num_steps:
        raise RecipeError(
            f"{options.folder}: is at step {trainer.next_step} already, beyond {num_steps} steps"
        )
    log = options.folder / "log.jsonl"
    _forget_steps_from(log, trainer.next_step if resumed else 0)
    began = time.perf_counter()
    num_tokens = 0
    smooth: dict[int, float] = {}
    with (
        log.open("a", encoding="utf-8") as file,
        tqdm(
            total=until, initial=trainer.next_step, desc=trainer.recipe.name, unit="step", dynamic_ncols=True
        ) as bar,
    ):

        def on_step(step: Step) -> None:
            nonlocal num_tokens
            num_tokens += step.num_tokens
            rate = num_tokens / (time.perf_counter() - began)
            for exit_layer, loss in step.loss_of_exit.items():
                smooth[exit_layer] = 0.9 * smooth.get(exit_layer, loss) + 0.1 * loss
            losses = " ".join(f"E{exit_layer}={loss:.2f}" for exit_layer, loss in sorted(smooth.items()))
            bar.set_postfix_str(f"{rate:,.0f} tokens/s {losses}")
            bar.update()
            file.write(json.dumps({**asdict(step), "tokens_per_s": round(rate)}) + "\n")
            file.flush()

        trainer.run(until=until, on_step=on_step, save_every=options.save_every)


def _forget_steps_from(log: Path, next_step: int) -> None:
    """Drop what a killed run logged after the state it left: those steps come again."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    # The last line of a killed run may be half written.
    whole = [line for line in lines if line.endswith("}")]
    known = [line for line in whole if json.loads(line)["number"] < next_step]
    log.write_text("".join(f"{line}\n" for line in known), encoding="utf-8")


def finish(model: LlamaForCausalLM, texts: Texts, trainer: Trainer, options: RunOptions) -> Path:
    """Evaluate, and write the checkpoint in bfloat16 as a folder that transformers and the engine load."""
    measured = measure(model, texts)
    folder = options.folder / trainer.recipe.name
    write_checkpoint(model, texts.tokenizer, folder)
    write_report(folder, {"held_out": measured}, texts, trainer)
    return folder


def measure(model: LlamaForCausalLM, texts: Texts) -> Mapping[str, object]:
    """What every exit knows of the held-out text, for a report."""
    return evaluate(model, held_out_windows(texts), bytes_per_token=texts.bytes_per_token).as_json()


def held_out_windows(texts: Texts) -> list[torch.Tensor]:
    """Evenly spread windows of the held-out ids."""
    starts = np.linspace(0, max(0, len(texts.held_out_ids) - _EVALUATED_TOKENS - 1), _EVALUATED_WINDOWS)
    return [
        torch.from_numpy(texts.held_out_ids[int(s) : int(s) + _EVALUATED_TOKENS + 1].astype(np.int64))
        for s in starts
    ]


def write_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder: bfloat16 safetensors, configuration, tokenizer."""
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_report(folder: Path, measured: Mapping[str, object], texts: Texts, trainer: Trainer) -> None:
    """`training.json` beside the weights: the recipe followed, what it read, and what was measured."""
    report = {
        "recipe": trainer.recipe.model_dump(mode="json", exclude_none=True),
        "steps": trainer.next_step,
        **measured,
        "sources": texts.sources,
        "training_tokens": len(texts.training_ids),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def make_accelerator(options: RunOptions) -> Accelerator:
    """Where and in which number format a run computes: bfloat16 products, float32 weights. Raises StartupError."""
    device = pick_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    if accelerator.num_processes > 1:
        raise RecipeError("training runs in one process; start it without a launcher")
    return accelerator


def _new_tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerFast:
    made: Tokenizer = train_tokenizer(corpus.training, vocab_size=recipe.data.vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _encoded(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Texts:
    assert isinstance(tokenizer.eos_token_id, int)
    backend, end_id = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    # What the model sees before every text that it is served.
    first = [token_id for token_id in tokenizer.encode("") if token_id != end_id]
    training_ids = encode(backend, corpus.training, first_ids=first, end_id=end_id)
    held_out_ids = encode(backend, corpus.held_out, first_ids=first, end_id=end_id)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    return Texts(
        tokenizer=tokenizer,
        training_ids=training_ids,
        held_out_ids=held_out_ids,
        bytes_per_token=held_out_bytes / len(held_out_ids),
        sources=tuple((s.name, s.licence, len(s.paths)) for s in corpus.sources),
    )
