import dataclasses
import itertools

import pytest
from plans import plan

from mae_jax.planning import cost
from mae_jax.planning.chips import parse_pod
from mae_jax.planning.cost import Communication
from mae_jax.planning.figures import Layout
from mae_jax.planning.program import Collective, Instruction, Program
from mae_jax.planning.search import cheapest, layouts, modelled, order, resized, search

WORK = {"none": 1.0, "dots": 1.1, "full": 1.3}
MEMORY = {"none": 1.0, "dots": 0.5, "full": 0.2}


def compiler(state, an_image, calls):
    """Plans of a model in GiB: its state, and an image's activations."""

    def compile_(layout, pod):
        calls.append((layout, pod))
        working = an_image * layout.images * MEMORY[layout.remat] + 1
        seconds = 0.01 * layout.images * layout.accumulate * WORK[layout.remat]
        seconds += 0.005 * layout.accumulate + 0.01 / layout.fsdp
        return plan(
            f"{pod.chip.name}:{'x'.join(map(str, pod.grid))}",
            layout,
            compute=seconds,
            exchange=0.004 if layout.fsdp == 1 else 0.006 * layout.accumulate,
            peak=state / layout.fsdp + working,
            state_bytes=round(state / layout.fsdp * 2**30),
        )

    return compile_


@pytest.mark.parametrize("state", [1, 6, 20])
@pytest.mark.parametrize("an_image", [0.1, 0.6, 1.2, 2.5])
def test_the_fastest_layout_that_fits_is_found_in_few_compilations(state, an_image):
    pod, calls = parse_pod("v5e-256"), []
    base = Layout(4096, 1, "none", 256, 1)
    plans = search(base, pod, compiler(state, an_image, calls))
    assert len(calls) <= 8
    assert len(set(calls)) == len(calls)
    mine = [p for p in plans if p.pod == pod]
    every = [
        compiler(state, an_image, [])(Layout(4096, n, remat, 256 // f, f), pod)
        for n, remat, f in itertools.product((1, 2, 4), WORK, (1, 256))
    ]
    best = min(every, key=order)
    assert mine[0].fits == best.fits
    if best.fits:
        assert plans[0] == mine[0]
        assert mine[0].layout == best.layout


def test_smaller_slices_have_the_same_batch():
    calls = []
    plans = search(Layout(4096, 1, "none", 256, 1), parse_pod("v5e-256"), compiler(1, 0.1, calls))
    sizes = {p.pod.chips: p.layout for p in plans if p.pod.chips < 256}
    assert set(sizes) == {128, 64, 32}
    assert {layout.batch_size for layout in sizes.values()} == {4096}
    assert sizes[64].images == 64


def test_the_layouts_begin_with_the_recipe_and_are_all_different():
    base = Layout(96, 1, "dots", 4, 4)
    found = list(layouts(base, parse_pod("v5e-16")))
    assert found[0] == base
    assert len(set(found)) == len(found)
    assert {f.accumulate for f in found} == {1, 2}  # 6 images a device
    assert all(f.data * f.fsdp == 16 and f.batch_size == 96 for f in found)


def test_the_cheapest_is_chosen_by_price_where_there_is_one():
    fast, cheap = plan("v6e-256", compute=0.1, price=2.7), plan("v5e-256", price=1.2)
    assert cheapest([cheap, fast]) == cheap
    unpriced = [dataclasses.replace(p, price=None) for p in (cheap, fast)]
    assert cheapest(unpriced) == unpriced[1]
    assert cheapest([plan(peak=99.0)]) is None


@pytest.mark.parametrize("fsdp", [1, 4, 16])
def test_a_slice_of_another_size_is_modelled_part_by_part(fsdp):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    small, large = parse_pod("v5e-16"), parse_pod("v5e-64")
    everyone = tuple(range(16))
    rings = tuple(tuple(range(i, i + fsdp)) for i in range(0, 16, fsdp))
    across = tuple(tuple(range(i, 16, fsdp)) for i in range(fsdp))
    groups = [("all-reduce", (everyone,))]
    groups += [("all-gather", rings), ("reduce-scatter", across)] if fsdp > 1 else []
    program = Program(
        tuple(
            Instruction(kind, kind, "collectives", 1, collective=Collective(kind, 10**8, "ici", g))
            for kind, g in groups
        )
    )
    made = plan("v5e-16", Layout(512, 1, "none", 16 // fsdp, fsdp), program=program, compute=0.4)
    whole = 64 if fsdp == 16 else fsdp
    layout = resized(made.layout, small, large)
    assert layout == Layout(512, 1, "none", 64 // whole, whole)
    other = modelled(made, large, layout)
    assert (other.layout, other.flops) == (layout, made.flops)
    assert other.modelled_from == "v5e-16"
    assert other.parts["optimizer"].seconds == made.parts["optimizer"].seconds
    assert other.parts["encoder MLP"].seconds == made.parts["encoder MLP"].seconds / 4
    expected = [("all-reduce", 64), ("all-gather", whole), ("reduce-scatter", 64 // whole)]
    sent = {one.kind: one.bytes for one in other.exchanged}
    for kind, members in expected[: len(groups)]:
        times = 2 if kind == "all-reduce" else 1
        assert sent[kind] == pytest.approx(times * 1e8 * (members - 1) / members, abs=1)
    again = modelled(made, small, made.layout)
    assert {one.kind: one.bytes for one in again.exchanged} == {
        one.kind: one.bytes for one in cost.communication(program, small)
    }
    assert isinstance(other.exchanged[0], Communication)
