"""The reader of compiled programs: hand-written ones with known answers, and a real one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deit_jax.perf import hlo_cost

LAYOUT = "{1,0:T(8,128)(2,1)S(1)}"
PROGRAM = f"""HloModule jit_step, entry_computation_layout={{(f32[4]{{0}})->f32[4]{{0}}}}

%fused_computation.1 (param_0.1: bf16[16,32]) -> bf16[16,256] {{
  %param_0.1 = bf16[16,32]{LAYOUT} parameter(0)
  ROOT %all-gather.7 = bf16[16,256]{LAYOUT} all-gather(%param_0.1), channel_id=7, dimensions={{1}}
}}

%fused_computation.2 (param_0.2: bf16[16,32]) -> bf16[16,256] {{
  %param_0.2 = bf16[16,32]{LAYOUT} parameter(0)
  ROOT %all-gather.8 = bf16[16,256]{LAYOUT} all-gather(%param_0.2), channel_id=7, dimensions={{1}}
}}

%all-reduce-scatter (input.1: f32[64,8]) -> f32[8,8] {{
  %input.1 = f32[64,8]{LAYOUT} parameter(0)
  %all-reduce.9 = f32[64,8]{LAYOUT} all-reduce(%input.1), channel_id=9, to_apply=%sum
  ROOT %slice.1 = f32[8,8]{LAYOUT} dynamic-slice(%all-reduce.9, %c, %c), dynamic_slice_sizes={{8,8}}
}}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p.1 = (s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %one = s32[]{{:T(128)}} constant(2)
  %count = s32[] get-tuple-element(%p.1), index=0
  %value = f32[8]{{0}} get-tuple-element(%p.1), index=1
  %inner = f32[8]{{0}} fusion(%value), kind=kLoop, calls=%sum, \
backend_config={{"estimated_cycles":"10"}}
  %move = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%inner), channel_id=3
  %moved = f32[8]{{0}} collective-permute-done(%move)
  %next = s32[] add(%count, %one)
  ROOT %result = (s32[]{{:T(128)}}, f32[8]{{0}}) tuple(%next, %moved)
}}

%condition (p.2: (s32[], f32[8])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(9)
  %p.2 = (s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %counter = s32[] get-tuple-element(%p.2), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}}

%chance (p.3: (s32[], f32[8])) -> pred[] {{
  %p.3 = (s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %drawn = f32[8]{{0}} get-tuple-element(%p.3), index=1
  ROOT %any = pred[] custom-call(%drawn), custom_call_target="Any"
}}

ENTRY %main (x: f32[8], w: bf16[16,32], g: f32[64,8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %w = bf16[16,32]{LAYOUT} parameter(1)
  %g = f32[64,8]{LAYOUT} parameter(2)
  %zero = s32[] constant(1)
  %start = s32[] copy(%zero)
  %fusion.1 = bf16[16,256]{LAYOUT} fusion(%w), kind=kCustom, calls=%fused_computation.1, \
backend_config={{"estimated_cycles":"100"}}
  %fusion.2 = bf16[16,256]{LAYOUT} fusion(%w), kind=kCustom, calls=%fused_computation.2, \
backend_config={{"estimated_cycles":"1000"}}
  %scattered = f32[8,8]{LAYOUT} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %both = (bf16[8]{{0}}, f32[]{{:T(128)}}) all-reduce(%a, %b), channel_id=1, to_apply=%sum
  %gather = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%x), channel_id=2, dimensions={{0}}
  %gathered = f32[64]{{0}} all-gather-done(%gather)
  %kernel = f32[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call"
  %carry = (s32[], f32[8]{{0}}) tuple(%start, %kernel)
  %loop = (s32[], f32[8]{{0}}) while(%carry), condition=%condition, body=%body
  %drawing = (s32[], f32[8]{{0}}) while(%loop), condition=%chance, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%drawing), index=1
}}
"""


def test_every_part_of_a_program_is_counted_as_often_as_it_runs():
    cost = hlo_cost.cost(PROGRAM)
    # The counter goes 1, 3, 5, 7; the loop whose end is drawn counts once.
    assert cost.cycles == 100 + 1000 + (4 + 1) * 10
    assert cost.unknown_loops == 1
    assert cost.custom_calls == 1
    assert cost.bytes == {
        "all_gather": 16 * 256 * 2 + 64 * 4,  # channel 7 is one collective, spread over two fusions
        "reduce_scatter": 64 * 8 * 4,
        "all_reduce": 8 * 2 + 4,
        "collective_permute": (4 + 1) * 8 * 4,
    }
    assert cost.counts == {
        "all_gather": 2,
        "reduce_scatter": 1,
        "all_reduce": 1,
        "collective_permute": 5,
    }


def test_a_noted_trip_count_is_taken():
    noted = 'while(%carry), backend_config={"known_trip_count":{"n":"7"}}, '
    cost = hlo_cost.cost(PROGRAM.replace("while(%carry), ", noted))
    assert cost.cycles == 1100 + (7 + 1) * 10


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[768,2304]{1,0:T(8,128)(2,1)S(1)}", 768 * 2304 * 2),
        ("(f32[3]{0}, /*index=1*/u8[5], s4[6], pred[2], token[])", 12 + 5 + 3 + 2),
        ("f8e4m3fn[10]", 10),
        ("f32[]{:T(128)}", 4),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo_cost.shape_bytes(shape) == size


def test_a_scans_collective_is_counted_at_every_turn():
    """XLA's own program for eight devices: each turn sums 8 x 16 floats over all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    places = NamedSharding(mesh, PartitionSpec(None, "data")), NamedSharding(mesh, PartitionSpec())

    def scan(rows, weights):
        def body(carry, row):
            return carry + jnp.tanh(row.T @ (row @ carry)), None

        return jax.lax.scan(body, weights, rows)[0]

    shapes = (
        jax.ShapeDtypeStruct((5, 32, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
    )
    compiled = jax.jit(scan, in_shardings=places, out_shardings=places[1]).lower(*shapes).compile()
    cost = hlo_cost.cost(compiled.as_text())
    assert cost.bytes["all_reduce"] == 5 * 8 * 16 * 4
    assert cost.unknown_loops == 0
