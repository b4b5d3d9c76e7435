"""Collectives between slices of TPUs, as the compiler writes them."""
# ruff: noqa: E501  (lines of HLO)

import pytest

from llmctl.plan import hlo

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
    found = hlo.count(SLICED.replace("WORK", work), {"data": 2, "fsdp": 4})
    (one,) = found.collectives
    assert (one.kind, one.axis, one.count, one.payload) == ("all-reduce", "slices", 1, 2 * 192 * 8 * 128)
    assert one.bytes == one.payload and one.hidden == (one.bytes if work else 0)
