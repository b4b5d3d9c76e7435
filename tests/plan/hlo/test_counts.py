"""Counts of compiled programs: against arithmetic, against the same program unrolled, and on text written by hand."""
# ruff: noqa: E501  (lines of HLO)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_samples import instruction, module
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmctl.plan.hlo import counts, hbm_traffic, operations, parser, replica_groups, trip_counts

L, N, D = 6, 64, 32


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def abstract(*shape, sharding=None, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def layer(x, w):
    return jnp.tanh(x @ w[0]) @ w[1], None


def test_a_scan_counts_as_its_layers_unrolled():
    """Forward and backward; with the loss, else the last product of the way forward would be left out."""

    def scanned(x, w):
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    def unrolled(x, w):
        for n in range(L):
            x, _ = layer(x, w[n])
        return jnp.sum(x)

    args = (abstract(N, D), abstract(L, 2, D, D))
    by_hand = 3 * L * 2 * 2.0 * N * D * D
    for loss in (scanned, unrolled):
        found = counts.count(compiled(jax.value_and_grad(loss, argnums=(0, 1)), *args), {"data": 1})
        assert found.flops == by_hand and found.flops_by_type == {"float32": by_hand} and not found.unknown_loops


def test_nested_scans_multiply():
    def outer(x, _):
        return jax.lax.scan(lambda y, w: (y @ w, None), x, jnp.ones((3, D, D)))[0], None

    found = counts.count(compiled(lambda x: jax.lax.scan(outer, x, None, length=5)[0], abstract(N, D)), {"data": 1})
    assert found.flops == 5 * 3 * 2 * N * D * D


def test_a_conditional_counts_its_dearest_branch():
    def fn(x, flag):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    found = counts.count(compiled(fn, abstract(D, D), abstract(dtype=jnp.bool_)), {"data": 1})
    assert found.flops == 2 * 2 * D**3


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))


def test_a_product_split_eight_ways_is_an_eighth(mesh):
    x = abstract(N, D, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    w = abstract(D, D, sharding=NamedSharding(mesh, P()))
    found = counts.count(compiled(lambda x, w: x @ w, x, w), dict(mesh.shape))
    assert found.flops == 2 * N * D * D / 8 and not found.collectives


def test_bytes_of_a_gather_and_of_a_reduction(mesh):
    """Parameters split over fsdp are gathered; a sum over rows that lie on data and fsdp is reduced."""
    x = abstract(N, D, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    w = abstract(D, D, sharding=NamedSharding(mesh, P("fsdp")))

    def loss(w, x):
        return jnp.sum(jnp.square(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))))

    def step(w, x):
        return jax.lax.with_sharding_constraint(jax.grad(loss)(w, x), NamedSharding(mesh, P()))

    found = {c.kind: c for c in counts.count(compiled(step, w, x), dict(mesh.shape)).collectives}
    whole = D * D * 4
    assert set(found) == {"all-gather", "all-reduce"}
    assert (found["all-gather"].axis, found["all-gather"].bytes) == ("fsdp", whole * 3 / 4)
    assert (found["all-reduce"].axis, found["all-reduce"].bytes) == ("data,fsdp", 2 * whole * 7 / 8)
    assert {c.payload for c in found.values()} == {whole} and {c.count for c in found.values()} == {1}


@pytest.mark.parametrize(
    "attributes, group",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, dimensions={0}", [0, 3]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [0, 1]),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", [0, 4]),
        ("source_target_pairs={{0,1},{1,2},{2,3}}", [0, 1, 2, 3]),
    ],
)
def test_groups(attributes, group):
    found = replica_groups.group_of(instruction(f"%x = f32[2]{{0}} all-reduce(%a), {attributes}, to_apply=%add"), 8)
    assert found == group


@pytest.mark.parametrize(
    "group, axis", [([0, 1], "tensor"), ([0, 2], "fsdp"), ([0, 1, 2, 3], "fsdp,tensor"), ([0, 4], "data"), ([9], "?")]
)
def test_the_axis_of_a_group(group, axis):
    assert replica_groups.axis_of(group, {"data": 2, "fsdp": 2, "tensor": 2}) == axis


LOOP = """
%inner (p.1: u32[], c.1: u32[]) -> u32[] {
  %p.1 = u32[] parameter(0)
  %c.1 = u32[] constant(STEP)
  ROOT %s.1 = u32[] add(%p.1, %c.1)
}

%body (p: (u32[], f32[8,16], f32[16,16], u32[])) -> (u32[], f32[8,16], f32[16,16], u32[]) {
  %p = (u32[], f32[8,16]{1,0}, f32[16,16]{1,0}, /*index=3*/u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0} get-tuple-element(%p), index=2
  %bound = u32[] get-tuple-element(%p), index=3
  %next = u32[] fusion(%i), kind=kLoop, calls=%inner
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (u32[], f32[8,16], f32[16,16], u32[]) tuple(%next, %y, %w, %bound)
}

%cond (q: (u32[], f32[8,16], f32[16,16], u32[])) -> pred[] {
  %q = (u32[], f32[8,16]{1,0}, f32[16,16]{1,0}, u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %most = u32[] get-tuple-element(%q), index=3
  ROOT %less = pred[] compare(%j, %most), direction=DIRECTION
}
"""


@pytest.mark.parametrize(
    "step, start, bound, direction, turns",
    [(1, 0, 8, "LT", 8), (2, 0, 8, "LT", 4), (3, 1, 8, "LT", 3), (1, 0, 8, "LE", 9), (2, 2, 8, "NE", 3), (1, 9, 8, "LT", 0)],
)  # fmt: skip
def test_turns_of_a_loop_that_the_compiler_does_not_know(step, start, bound, direction, turns):
    """The bound is an element that the body hands on; the counter goes through a fusion."""
    body = f"""
%a = f32[8,16]{{1,0}} parameter(0)
%b = f32[16,16]{{1,0}} parameter(1)
%zero = u32[] constant({start})
%eight = u32[] constant({bound})
%init = (u32[], f32[8,16], f32[16,16], u32[]) tuple(%zero, %a, %b, %eight)
ROOT %loop = (u32[], f32[8,16], f32[16,16], u32[]) while(%init), condition=%cond, body=%body"""
    text = module(body, LOOP.replace("STEP", str(step)).replace("DIRECTION", direction))
    found = counts.count(text, {"data": 1})
    assert found.flops == turns * 2 * 8 * 16 * 16 and not found.unknown_loops


def test_a_loop_that_nobody_knows_is_named():
    body = """
%a = f32[8,16]{1,0} parameter(0)
%b = f32[16,16]{1,0} parameter(1)
%zero = u32[] parameter(2)
%init = (u32[], f32[8,16], f32[16,16], u32[]) tuple(%zero, %a, %b, %zero)
ROOT %loop = (u32[], f32[8,16], f32[16,16], u32[]) while(%init), condition=%cond, body=%body"""
    text = module(body, LOOP.replace("STEP", "1").replace("DIRECTION", "LT"))
    found = counts.count(text, {"data": 1})
    assert found.unknown_loops == ["loop"] and found.flops == 2 * 8 * 16 * 16
    parsed = parser.parse(text)
    main = parsed.computations["main"]
    assert trip_counts.trips(parsed, main, main.root) is None


def test_a_product_written_as_a_convolution_counts_no_padding():
    """A TPU joins two halves of a windowed product as a kernel of width 2 over an input of width 1, padded by 1."""
    body = """
%x = bf16[2,2048,1024,1]{1,2,0,3} parameter(0)
%w = bf16[1024,2,64,1]{0,2,1,3} parameter(1)
ROOT %y = bf16[2,2048,2,64]{1,3,2,0:T(8,128)(2,1)S(1)} convolution(%x, %w), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"""
    found = counts.count(module(body), {"data": 1})
    assert found.flops == 2 * (2 * 2048) * 1024 * (2 * 64) and found.flops_by_type == {"bfloat16": found.flops}


def test_a_plain_convolution_is_a_matrix_product():
    body = """
%x = s8[8,64]{1,0} parameter(0)
%w = s8[64,32]{1,0} parameter(1)
ROOT %y = s32[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf"""
    assert counts.count(module(body), {"data": 1}).flops_by_type == {"int8": 2.0 * 8 * 64 * 32}


SPLASH = """
%m = s8[1,4,4]{2,1,0} parameter(0)
%n = s8[1,4,4]{2,1,0} parameter(1)
%q = bf16[2,8,2048,128]{3,2,1,0} parameter(2)
%k = bf16[2,2,2048,128]{3,2,1,0} parameter(3)
%v = bf16[2,2,2048,128]{3,2,1,0} parameter(4)
%s = s32[2,2048,128]{2,1,0} parameter(5)
%q1 = bf16[8,2048,128]{2,1,0} parameter(6)
%k1 = bf16[2,2048,128]{2,1,0} parameter(7)
ROOT %splash_mha_fwd_segmented.2 = bf16[2,8,2048,128]{3,2,1,0} custom-call(OPERANDS), custom_call_target="tpu_custom_call"
"""


@pytest.mark.parametrize(
    "operands, share, rows",
    [("%m, %n, %q, %k, %v, %s", 10 / 16, 2), ("%q, %k, %v, %s", 1.0, 2), ("%m, %n, %q1, %k1, %k1, %s", 10 / 16, 1)],
)
def test_an_attention_kernel_is_named_and_counted_from_its_shapes(operands, share, rows):
    """Of 4 x 4 blocks a causal kernel runs 10; where there is no table of blocks all run."""
    found = counts.count(module(SPLASH.replace("OPERANDS", operands)), {"data": 1})
    assert found.kernels == {"splash_mha_fwd_segmented": 1} and found.flops == 0
    assert found.kernel_flops == 2 * 2 * (rows * 8 * 2048 * 128) * 2048 * share


def test_bytes_of_slices_updates_and_the_chips_own_memory():
    more = """
%part (p: f32[64,8], n: s32[]) -> f32[1,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,8}
}

%put (p.1: f32[64,8], u.1: f32[1,8], n.1: s32[]) -> f32[64,8] {
  %p.1 = f32[64,8]{1,0} parameter(0)
  %u.1 = f32[1,8]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  ROOT %o.1 = f32[64,8]{1,0} dynamic-update-slice(%p.1, %u.1, %n.1, %n.1)
}

%moved (p.2: f32[64,8]) -> f32[64,8] {
  %p.2 = f32[64,8]{1,0} parameter(0)
  ROOT %c.2 = f32[64,8]{0,1} copy(%p.2)
}

%narrow (p.4: f32[64,8]) -> bf16[64,8] {
  %p.4 = f32[64,8]{1,0} parameter(0)
  ROOT %c.4 = bf16[64,8]{1,0} convert(%p.4)
}

%narrow_product (p.5: f32[64,8]) -> bf16[64] {
  %p.5 = f32[64,8]{1,0} parameter(0)
  %m.5 = bf16[64,8]{1,0} fusion(%p.5), kind=kLoop, calls=%narrow
  %z.5 = bf16[] constant(0)
  ROOT %r.5 = bf16[64]{0} reduce(%m.5, %z.5), dimensions={1}, to_apply=%part
}

%product (p.3: f32[64,8]) -> f32[64] {
  %p.3 = f32[64,8]{1,0} parameter(0)
  %m.3 = f32[64,8]{0,1} fusion(%p.3), kind=kLoop, calls=%moved
  %z.3 = f32[] constant(0)
  ROOT %r.3 = f32[64]{0} reduce(%m.3, %z.3), dimensions={1}, to_apply=%part
}
"""
    body = """
%a = f32[64,8]{1,0} parameter(0)
%n = s32[]{:S(6)} parameter(1)
%one = f32[1,8]{1,0:S(1)} fusion(%a, %n), kind=kLoop, calls=%part
%two = f32[64,8]{1,0} fusion(%a, %one, %n), kind=kLoop, calls=%put
%far = f32[64,8]{1,0:S(5)} copy(%a)
%moves = f32[64,8]{0,1} fusion(%a), kind=kLoop, calls=%moved
%product = f32[64]{0} fusion(%a), kind=kLoop, calls=%product
%narrow = bf16[64,8]{1,0} fusion(%a), kind=kLoop, calls=%narrow
%narrowed = bf16[64]{0} fusion(%a), kind=kLoop, calls=%narrow_product
ROOT %sum = f32[64,8]{1,0} add(%a, %two)"""
    parsed = parser.parse(module(body, more))
    main = parsed.computations["main"]
    row, whole = 8 * 4, 64 * 8 * 4
    expected = {"one": row, "two": row, "far": whole, "sum": 3 * whole}
    expected |= {"moves": 2 * whole, "product": whole + 64 * 4}  # a copy within a fusion reads what it copies
    expected |= {"narrow": 1.5 * whole, "narrowed": whole + 64 * 2}  # a conversion reads the array before it
    assert {n: hbm_traffic.of(parsed, main, main.by_name[n]) for n in expected} == expected


def test_types():
    found = parser.arrays("(bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s4[3]{0}, f8e4m3fn[4], token[], pred[])")
    assert [(a.dtype, a.bytes, a.hbm) for a in found] == [
        ("bf16", 32, 0), ("s4", 1.5, 1.5), ("f8e4m3fn", 4, 4), ("token", 0, 0), ("pred", 1, 1),
    ]  # fmt: skip


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        parser.parse("HloModule nothing")


def test_a_library_product():
    line = """%a = bf16[8,64]{1,0} parameter(0)
%b = bf16[64,32]{1,0} parameter(1)
ROOT %g = bf16[8,32]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}"""
    main = parser.parse(module(line)).computations["main"]
    assert operations.matrix(main, main.root) == (2.0 * 8 * 64 * 32, "bfloat16")
