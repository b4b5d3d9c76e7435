"""Compute the config of the model after structured pruning, and check that the model can be pruned to this config."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data
from llmctl.compress.structured_pruning import budget, channel_cut, latency, shrink, stored_bytes
from llmctl.compress.structured_pruning.search_space import Size, Space
from llmctl.compress.structured_pruning.settings import StructuredSettings
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

Params = dict[str, Any]


def target(
    config: StructuredSettings, base: Artifact, params: Params, method: StructuredMethod, mesh: Mesh, rows: int
) -> ModelConfig:
    """Return the model's config after structured pruning.

    If a budget is set, the sizes are estimated from uniform pruning ratios. For a budget of latency, the sizes keep the
    same fraction of the FLOPs, because nothing is measured.

    Raises:
      RequestError: If a size is impossible. If the model cannot be pruned to the sizes. If the mesh cannot shard the
        pruned model.
    """
    if asked := config.budget.asked:
        space, size, wanted = search(config, base, params, asked, method, mesh, rows)
        return _with_rows(space.uniform(wanted, size), rows)
    model = base.model
    if config.sized:
        model = shrink.target(
            model, heads=config.heads, ffn=config.ffn, layers=config.layers, hidden=config.hidden,
            by="groups" if config.heads_by == "groups" else "queries", multiple=config.multiple,
        )  # fmt: skip
    model = _with_rows(model, rows)
    check_method(base, params, method)
    check_sizes(base.model, params, model, mesh)
    return model


def search(
    config: StructuredSettings,
    base: Artifact,
    params: Params,
    asked: tuple[budget.Kind, float],
    method: StructuredMethod,
    mesh: Mesh,
    rows: int,
) -> tuple[Space, Size, float]:
    """Return the inputs of a budget search: the allowed sizes, the function that computes a size, and the limit.

    Sizes are allowed if the mesh can shard the pruned model, and if every weight can be reduced. For example, the
    hidden width cannot be reduced if a weight is quantized in groups along the channels. `rows` is the number of tokens
    in the vocabulary after pruning.

    Nothing is measured. If the budget limits the latency, the function and the limit are for FLOPs instead.
    `llmctl.compress.structured_pruning.latency_table` measures the latency.

    Raises:
      RequestError: If no sizes meet the budget, or the method does not fit the model.
    """
    cfg = base.model
    check_method(base, params, method)
    groups, queries = range(cfg.kv_heads, 0, -1), range(cfg.heads // cfg.kv_heads, 0, -1)
    if config.heads_by == "queries" and len(queries) == 1:
        raise RequestError("heads_by = 'queries': each key/value head has one query head, so none can be removed alone")
    heads = {"groups": {}, "queries": {"heads": [*groups[:1]], "queries": [*queries]}, "both": {"queries": [*queries]}}
    space = Space(cfg, config.multiple, **heads[config.heads_by]).restricted(
        lambda model: check_sizes(cfg, params, _with_rows(model, rows), mesh),
        each=mesh.size > 1,
        tries=mesh.shape["tensor"],
    )
    if asked[0] == "bytes":
        count = stored_bytes.counter(cfg, params)
    else:
        count = budget.size_of(asked[0], calibration_data.sequence_length(config, base))

    def size(model: ModelConfig) -> float:
        return count(_with_rows(model, rows))

    if asked[0] == "latency":
        timing(config, base)
        return space, size, max(size(space.smallest()), asked[1] * count(cfg))
    return space, size, budget.limit(space, asked, size, count(cfg))


def timing(config: StructuredSettings, base: Artifact) -> latency.Timing:
    """Return the `Timing` that a budget of latency measures.

    Raises:
      RequestError: If the model lacks the phase that `latency_of` names, or the context is too long.
    """
    own, longest = config.budget, base.model.max_seq_len
    if own.context > longest:
        raise RequestError(f"budget.context: {own.context:,} tokens, but {base.path} reads {longest:,} at most")
    context = own.context or calibration_data.sequence_length(config, base)
    return latency.timing(base.model, own.latency_of, own.batch_size, context)


def _with_rows(cfg: ModelConfig, rows: int) -> ModelConfig:
    """Return the config with another number of tokens in the vocabulary."""
    return cfg if rows == cfg.vocab_size else cfg.model_copy(update={"vocab_size": rows, "preset": ""})


def check_sizes(cfg: ModelConfig, params: Params, model: ModelConfig, mesh: Mesh) -> None:
    """Check that the model `cfg` can be pruned to the config `model`, and that the mesh can shard the result.

    Raises:
      RequestError: If the model cannot be pruned to these sizes, or the mesh cannot shard the pruned model.
    """
    functional.shardings(model, functional.abstract(model), mesh)  # raises if the mesh cannot split the sizes
    shrink.check_cuttable(cfg, params, model)
    channel_cut.check(cfg, params, model.d_model)


def check_method(base: Artifact, params: Params, method: StructuredMethod) -> None:
    """Check, before any computation, that the method fits the model.

    Raises:
      RequestError: If repair would change the integers of a quantized matrix, or the zeros of a pruned matrix.
    """
    if not method.repair:
        return
    if base.manifest.pruned:
        raise RequestError(
            f"{base.path}: is pruned ({base.manifest.sparsity:.1%} zeros), and repair would fill the zeros; remove "
            "heads, neurons and channels first, or leave out repair"
        )
    for m in weights.matrices(params, "block"):
        if not weights.is_plain(m.weight):
            raise RequestError(
                f"{m.path} is quantized, and repair gives other values to the weights that it keeps; leave out repair, "
                "or prune the artifact that was quantized"
            )


def describe(config: StructuredSettings, before: ModelConfig, after: ModelConfig) -> str:
    """Return one line about structured pruning: the settings, and each size before and after."""
    fields = {"layers": "layers", "heads": "heads", "ffn": "d_ff", "hidden": "d_model"}
    if asked := config.budget.asked:
        changes = [f"{part} {getattr(before, f)} → {getattr(after, f)}" for part, f in fields.items()]
        return f"budget.{asked[0]} = {asked[1]:g}: {', '.join(changes)}"
    parts = []
    for part, field in fields.items():
        request, old, new = getattr(config, part), getattr(before, field), getattr(after, field)
        if request:
            line = f"{'remove' if request < 1 else 'keep'}_{part} = {request:g}: {part} {old} → {new}"
            if part == "layers" and before.encoder_layers:
                line += f", encoder {before.encoder_layers} → {after.encoder_layers}"
            parts.append(line)
    return "; ".join(parts)
