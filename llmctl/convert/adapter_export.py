"""Write an artifact's adapter in PEFT's format, and check that base and written adapter give the artifact's outputs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.convert import (
    hf_export,
    lazy_tensors,
    parity,
    peft,
    peft_prefix,
    peft_prompt,
    proof_texts,
    sentence_transformer,
    text_proof,
    tokenizer_export,
)
from llmctl.data.tokenizers.prompt_prefix import with_prefix
from llmctl.evaluate.tasks import registry
from llmctl.model import weights


def write(found: Artifact, draft: Path, say: Callable[[str], None]) -> tuple[float, float | None, str]:
    """Write an artifact's adapter to the folder `draft`, and check that the written adapter gives equal outputs.

    The written adapter is loaded onto the base for this check.

    Args:
        found: The artifact.
        draft: Folder of the written files.
        say: Function that is called with one line of text per message to the user.

    Returns:
        (difference in llmctl, difference in PEFT, description of the comparison). A difference is the largest absolute
        difference between outputs of the artifact and of the base with the written adapter. The second difference is
        None if PEFT is not installed.

    Raises:
        RequestError: If PEFT's format cannot hold the adapter.
        WorkError: If the outputs differ.
    """
    vectors = found.model.prompt_tokens or found.model.prefix_tokens
    return (_vectors if vectors else _low_rank)(found, draft, say)


def _low_rank(found: Artifact, draft: Path, say: Callable[[str], None]) -> tuple[float, float | None, str]:
    """Write an adapter, load it onto the base with PEFT, and compare the outputs with those of the artifact.

    If PEFT is not installed, llmctl loads the adapter.

    Returns:
        The same as `write`.

    Raises:
        RequestError: If the base cannot be written in the Hugging Face format.
    """
    cfg, task, labels = found.model, registry.of(found.manifest), found.manifest.labels
    hf_export.config_of(cfg, task, labels, {}, "float32")
    if left := task.hf_fields(cfg, labels, found.manifest.fitted).keys() - task.hf_fields(cfg, labels, {}).keys():
        say(f"{found.path}: an adapter's files have no place for {', '.join(sorted(left))}, which stay behind")
    delta = peft.export(found, draft)
    bases = weights.flatten(weights.without_adapters(found.params)).values()
    integers = [weights.as_node(w).integers() for w in bases]
    missing = text_proof.available(4 * found.manifest.parameters, "peft")
    if any(w is not None and w.activations for w in integers):
        missing = "the base quantizes activations, which a dense base does not"
    if missing:
        return delta, None, f"{text_proof.OUR_READER} ({missing})"
    with tempfile.TemporaryDirectory(prefix="llmctl-") as work, jax.default_matmul_precision("highest"):
        base, theirs, params = Path(work), cfg, peft.base_of(found)
        written = tokenizer_export.export_tokenizer(found.tokenizer_dir, base, cfg, found.manifest.seq_len)
        if written and written.rows:
            theirs, params = tokenizer_export.with_rows(cfg, params, written.rows)
        config = hf_export.config_of(theirs, task, labels, written.ids if written else {}, "float32")
        hf_export.save(base, config, hf_export.tensors_of(theirs, params, lazy_tensors.dtype("float32")))
        if cfg.head_kind.bare:
            sentence_transformer.save(cfg, base)
        samples, begin = text_proof.read_rows(found, theirs, base, True, say)
        expected = np.asarray(parity.answers(cfg, found.params, proof_texts.batch_of(cfg, samples)))
        got = text_proof.answers_there(theirs, base, samples, adapter=draft)
    return (
        delta,
        parity.prove(str(found.path), got, expected[-len(samples.rows) :]),
        f"{begin}PEFT reads what was written",
    )


def _vectors(found: Artifact, draft: Path, say: Callable[[str], None]) -> tuple[float, float | None, str]:
    """Write a trained prompt or prefix, load it onto the base with PEFT, and compare the outputs with the artifact's.

    Returns:
        The same as `write`.

    Raises:
        RequestError: If the artifact has both a prompt and a prefix, or if the vectors cannot be written.
    """
    if found.model.prompt_tokens and found.model.prefix_tokens:
        raise RequestError(f"{found.path}: has a trained prompt and a trained prefix; PEFT's files hold one of the two")
    prompt = found.model.prompt_tokens > 0
    delta = (peft_prompt if prompt else peft_prefix).export(found, draft)
    if missing := text_proof.available(4 * found.manifest.parameters, "peft"):
        return delta, None, f"{text_proof.OUR_READER} ({missing})"
    cfg, about = found.model, found.manifest
    with tempfile.TemporaryDirectory(prefix="llmctl-") as work, jax.default_matmul_precision("highest"):
        folder = Path(work) / "base"
        folder.mkdir()
        if prompt:
            bare = dataclasses.replace(peft_prompt.without_prompt(found), path=Path(work) / "bare")
            with_prefix(found.tokenizer_dir, bare.tokenizer_dir, ())
        else:
            bare = peft_prefix.without_prefix(found)
        theirs, params = bare.model, bare.params
        written = tokenizer_export.export_tokenizer(bare.tokenizer_dir, folder, theirs, about.seq_len)
        if written and written.rows:
            theirs, params = tokenizer_export.with_rows(theirs, params, written.rows)
        ids = written.ids if written else {}
        config = hf_export.config_of(theirs, registry.of(about), about.labels, ids, "float32")
        hf_export.save(folder, config, hf_export.tensors_of(theirs, params, lazy_tensors.dtype("float32")))
        samples, begin = text_proof.read_rows(bare, theirs, folder, True, say)
        batch = proof_texts.batch_of(bare.model, samples)
        expected = np.asarray(parity.answers(cfg, found.params, parity.prompted(cfg, batch) if prompt else batch))
        outputs = 0 if cfg.encoder_layers else cfg.prompt_tokens
        got = text_proof.answers_there(theirs, folder, samples, adapter=draft, prompt=outputs)
    return (
        delta,
        parity.prove(str(found.path), got, expected[-len(samples.rows) :]),
        f"{begin}PEFT reads what was written",
    )
