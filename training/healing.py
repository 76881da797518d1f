"""Heals an existing checkpoint: goes on training it by the recipe, so that its early layers learn to speak.

Knows what healing adds to a run: the model to start from, its own texts, low-rank updates, the untouched teacher.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from config.settings import EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams, sequence_seed
from training.corpus import Source, Windows, read_corpus
from training.recipe import Lora, OwnTexts, Recipe, RecipeError
from training.runs import (
    RunOptions,
    Texts,
    TextSource,
    follow,
    keep_texts,
    kept_texts,
    make_accelerator,
    measure,
    write_checkpoint,
    write_report,
)
from training.trainer import Trainer

_HASHED_BYTES: Final = 1 << 20
_LORA_TARGETS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def heal(recipe: Recipe, model_name: str, options: RunOptions) -> Path:
    """Train `model_name` on; returns the folder of the healed checkpoint. Goes on where an earlier run stopped.

    Raises RecipeError, or CheckpointError for a model that is none of the Llama family.
    """
    if recipe.architecture is not None:
        raise RecipeError(f"recipe {recipe.name}: architecture is for `train`; a healed model has its own")
    origin = open_checkpoint(model_name, revision=None).folder
    accelerator = make_accelerator(options)
    texts = _texts(recipe, origin, options)
    model = LlamaForCausalLM.from_pretrained(origin, dtype="float32")
    model.to(accelerator.device)
    before = _measure_once(model, texts, options.folder / "before.json")
    teacher = copy.deepcopy(model).eval().to(accelerator.device) if recipe.distillation else None
    # Low-rank updates start at random.
    torch.manual_seed(recipe.seed)
    if recipe.lora is not None:
        _add_lora(model, recipe.lora)
    windows = Windows(texts.training_ids, recipe.seed)
    trainer = Trainer(recipe, model, windows, options.folder, accelerator=accelerator, teacher=teacher)
    follow(trainer, options)
    if recipe.lora is not None:
        _merge_lora(model)
    if recipe.kept_update < 1:
        keep_update(model, LlamaForCausalLM.from_pretrained(origin, dtype="float32"), recipe.kept_update)
    after = measure(model, texts)
    folder = options.folder / recipe.name
    write_checkpoint(model, texts.tokenizer, folder)
    _keep_generation_defaults(origin, folder)
    write_report(folder, {"before": before, "after": after}, texts, trainer)
    return folder


def write_own_texts(settings: EngineSettings, wanted: OwnTexts, folder: Path, *, seed: int) -> Source:
    """Let the model write texts of its own, one file each; files that are already there are kept.

    A chat model begins where a user would speak, so that it writes question and answer; another from nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.txt" for number in range(wanted.count)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        prompt_ids = _beginning(tokenizer)
        engine = Engine.load(settings)
        requests = [_request(number, prompt_ids, wanted, seed) for number in missing]
        for number, events in engine.generate(requests).items():
            ids = [*prompt_ids, *(token for event in events for token in event.token_ids)]
            paths[number].write_text(tokenizer.decode(ids), encoding="utf-8")
    return Source(f"own texts of {Path(settings.model).name}", "as the model", tuple(paths))


def _request(number: int, prompt_ids: list[int], wanted: OwnTexts, seed: int) -> Generate:
    return Generate(
        sequence_id=number,
        prompt_ids=prompt_ids,
        max_new_tokens=wanted.num_tokens,
        sampling=SamplingParams(temperature=wanted.temperature),
        seed=sequence_seed(seed, prompt_index=number, choice_index=0),
        stop_token_ids=[],
        exit_layer=1,
        draft_length=0,
    )


def _beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if tokenizer.chat_template is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first]
    mark = "\0"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    ids: list[int] = tokenizer.encode(text.partition(mark)[0], add_special_tokens=False)
    return ids


def keep_update(model: LlamaForCausalLM, untouched: LlamaForCausalLM, share: float) -> None:
    """Move the weights of `model` towards those it started from: this share of the way is left. In place."""
    theirs = dict(untouched.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(theirs[name].to(parameter), 1 - share)


def _texts(recipe: Recipe, origin: Path, options: RunOptions) -> Texts:
    """The run's texts; the first time they are read, and the model's own ones written."""
    source = TextSource(recipe.data, _fingerprint(origin))
    known = kept_texts(options.folder, source)
    if known is not None:
        return known
    more = []
    if recipe.data.own_texts is not None:
        settings = EngineSettings(
            model=str(origin), device=options.device, num_threads=options.num_threads, draft_length=0
        )
        folder = options.folder / "own_texts"
        more.append(write_own_texts(settings, recipe.data.own_texts, folder, seed=recipe.seed))
    corpus = read_corpus(recipe.data, *more)
    return keep_texts(corpus, AutoTokenizer.from_pretrained(origin), options.folder, source)


def _fingerprint(checkpoint: Path) -> str:
    """A hash of configuration and weights, of large files their ends alone."""
    digest = hashlib.sha256()
    for path in sorted([checkpoint / "config.json", *checkpoint.glob("*.safetensors")]):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, path.stat().st_size - _HASHED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _keep_generation_defaults(origin: Path, folder: Path) -> None:
    """End-of-sequence ids and sampling defaults are the model's own, as its authors wrote them."""
    path = origin / "generation_config.json"
    if path.is_file():
        shutil.copyfile(path, folder / path.name)


def _measure_once(model: LlamaForCausalLM, texts: Texts, path: Path) -> dict[str, Any]:
    if not path.is_file():
        path.write_text(json.dumps(measure(model, texts)), encoding="utf-8")
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known


def _add_lora(model: LlamaForCausalLM, wanted: Lora) -> None:
    """Freeze the model and put low-rank updates beside the matrices of its layers, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RecipeError("lora: needs the package peft; install layerskip-server[train]") from error

    model.requires_grad_(requires_grad=False)
    chosen = LoraConfig(
        r=wanted.rank, lora_alpha=wanted.alpha, target_modules=_LORA_TARGETS, lora_dropout=0.0
    )
    inject_adapter_in_model(chosen, model)


def _merge_lora(model: LlamaForCausalLM) -> None:
    """Add the updates to the matrices they stand beside, and leave plain linear layers, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
