"""Collectives beside computation, and fused with it, as the compiler writes them."""
# ruff: noqa: E501  (lines of HLO)

import pytest
from hlo_samples import module

from llmctl.plan.hlo import counts

ASYNC = """
%a = bf16[128]{0} parameter(0)
%x = f32[8,8]{1,0} parameter(1)
%go = (bf16[128]{0}, bf16[512]{0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true, frontend_attributes={note={
"text":"over lines"
}}
BETWEEN
%came = bf16[512]{0} all-gather-done(%go)
ROOT %t = (bf16[512], f32[8,8]) tuple(%came, %x)"""


@pytest.mark.parametrize(
    "between, hidden",
    [
        ("%y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 1),
        ("%y = f32[8,8]{1,0} add(%x, %x)", 0),
    ],
)
def test_what_runs_beside_computation(between, hidden):
    (found,) = counts.count(module(ASYNC.replace("BETWEEN", between)), {"data": 2, "fsdp": 4}).collectives
    assert (found.kind, found.axis, found.count) == ("all-gather", "fsdp", 1)
    assert (found.payload, found.bytes) == (1024, 768)
    assert (found.overlapped, found.hidden) == (hidden, 768 * hidden)


FUSED_GATHER = """
%start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:S(1)} parameter(0)
  %g = bf16[16,8]{1,0} all-gather(%p), replica_groups=mesh['a'=4] {'a'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[4,8], x.1: f32[8,8]) -> f32[8,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %x.1 = f32[8,8]{1,0} parameter(1)
  %g.1 = bf16[16,8]{1,0} all-gather(%p.1), replica_groups=mesh['a'=4] {'a'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %d = f32[8,8]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_gather_fused_with_other_work_counts_once():
    body = """
%a = bf16[4,8]{1,0} parameter(0)
%x = f32[8,8]{1,0} parameter(1)
%s = (bf16[4,8], bf16[16,8]) fusion(%a), kind=kCustom, calls=%start
ROOT %f = f32[8,8]{1,0} fusion(%a, %x), kind=kOutput, calls=%beside"""
    found = counts.count(module(body, FUSED_GATHER), {"fsdp": 4})
    (one,) = found.collectives
    assert (one.count, one.overlapped, one.bytes) == (1, 1, 4 * 8 * 2 * 3) and found.flops == 2 * 8**3


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    more = """
%scatter (p: f32[16,8], n: s32[]) -> f32[4,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %r = f32[16,8]{1,0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[4,8]{1,0} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={4,8}
}
"""
    body = """
%a = f32[16,8]{1,0} parameter(0)
%n = s32[] parameter(1)
ROOT %f = f32[4,8]{1,0} fusion(%a, %n), kind=kCustom, calls=%scatter"""
    (found,) = counts.count(module(body, more), {"fsdp": 4}).collectives
    assert (found.kind, found.bytes) == ("reduce-scatter", 16 * 8 * 4 * 3 / 4)
