"""Collectives of TPUs that run elsewhere, as the compiler writes them: on hosts, between slices, and on cores of their own."""
# ruff: noqa: E501  (lines of HLO)

import pytest

from llmctl.plan.hlo import counts

PRODUCT = "%d = f32[64,64]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
SLICED = """
HloModule m

ENTRY %main (p: bf16[192,8,128], q: f32[64,64]) -> bf16[192,8,128] {
  %p = bf16[192,8,128]{2,1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %after-all.1 = token[] after-all()
  %send.1 = (bf16[192,8,128]{2,1,0}, u32[], token[]) send(%p, %after-all.1), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.115_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[192,8,128]{2,1,0}, u32[], token[]) recv(%after-all.1), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.115_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  WORK
  %send-done.1 = token[] send-done(%send.1), channel_id=6, is_host_transfer=true
  %recv-done.1 = (bf16[192,8,128]{2,1,0}, token[]) recv-done(%recv.1), channel_id=5, is_host_transfer=true
  ROOT %out = bf16[192,8,128]{2,1,0} get-tuple-element(%recv-done.1), index=0
}
"""


@pytest.mark.parametrize(
    "work", ["", "%d = f32[64,64]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}"]
)
def test_what_the_hosts_sum_between_slices_counts(work):
    """It stands in no collective of the program: devices send, and receive the sum over 2 slices."""
    found = counts.count(SLICED.replace("WORK", work), {"data": 2, "fsdp": 4})
    (one,) = found.collectives
    assert (one.kind, one.axis, one.count, one.payload) == ("all-reduce", "slices", 1, 2 * 192 * 8 * 128)
    assert one.bytes == one.payload and one.hidden == (one.bytes if work else 0)


SPARSE = """
HloModule m

%called (p: f32[128,512], t: token[]) -> f32[128,512] {
  %t = token[] parameter(1)
  %p = f32[128,512]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[128,512]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true
}, execution_thread="sparsecore"

%next (input: f32[64,64]) -> f32[64,64] {
  %input = f32[64,64]{1,0} parameter(0)
  ROOT %twice = f32[64,64]{1,0} add(%input, %input)
}

ENTRY %main (p: f32[128,512], q: f32[64,64]) -> f32[128,512] {
  %p = f32[128,512]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %prepare = token[] custom-call(), custom_call_target="PrepareAsyncCallStart"
  %more = f32[64,64]{1,0} fusion(%q), kind=kLoop, calls=%next
  %go = ((f32[128,512]{1,0}, token[]), f32[128,512]{1,0}) call-start(%p, %prepare), async_execution_thread="sparsecore", to_apply=%called, control-predecessors={%more}
  WORK
  ROOT %done = f32[128,512]{1,0} call-done(%go)
}
"""


@pytest.mark.parametrize("work", ["", PRODUCT])
def test_what_runs_on_cores_of_its_own_counts(work):
    """Once, with the bytes that it reads and writes, and the computation that stands behind it is found."""
    found = counts.count(SPARSE.replace("WORK", work), {"data": 8})
    (one,) = found.collectives
    assert (one.kind, one.axis, one.count, one.payload) == ("all-reduce", "data", 1, 4 * 128 * 512)
    assert one.hidden == (one.bytes if work else 0) and not found.kernels
    assert found.bytes == 2 * 4 * 128 * 512 + 2 * 4 * 64 * 64 + (3 * 4 * 64 * 64 if work else 0)
