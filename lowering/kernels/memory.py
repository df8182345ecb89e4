"""One arena for everything that lives only within a step: buffers whose lives do not overlap share a slot.

Sizes are symbolic, so slots are chosen when a program is compiled and laid out when it is called: a slot is as large
as its largest buffer at the sizes of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import sympy

from irc.lowering.kernels.buffers import ITEM_BYTES, Buffer
from irc.lowering.kernels.fusion import Schedule
from irc.lowering.kernels.kernel import Kernel, Store
from irc.lowering.kernels.sites import TemplateCall
from irc.lowering.kernels.values import loads

ALIGNMENT = 64


@dataclass
class Slot:
    """A part of the arena: as many bytes as the largest of `sizes`; if private, for each worker that is alone."""

    sizes: list[sympy.Expr] = field(default_factory=list)
    hint: int = 0
    private: bool = False


@dataclass
class Plan:
    """Where temporary buffers are.

    Attributes:
        slots: of the arena, in order.
        places: buffer → its slot.
        in_place: buffers that took over the memory of an operand at the step that wrote them.
    """

    slots: list[Slot] = field(default_factory=list)
    places: dict[Buffer, int] = field(default_factory=dict)
    in_place: list[Buffer] = field(default_factory=list)


def touched(step: Kernel | TemplateCall) -> tuple[list[Buffer], list[Buffer]]:
    """(buffers that a step writes, buffers that it reads)."""
    if isinstance(step, Kernel):
        return step.writes, step.reads
    return [step.write], [*(read.buffer for read in step.reads), *step.extra_reads]


def plan_memory(schedule: Schedule, hints: Mapping[sympy.Symbol, int], private: Set[Buffer] = frozenset()) -> Plan:
    """Give each temporary buffer of a schedule a slot; private buffers share with private ones only."""
    plan = Plan()
    last_use: dict[Buffer, int] = {}
    for number, step in enumerate(schedule.steps):
        for buffer in (*touched(step)[0], *touched(step)[1]):
            last_use[buffer] = number
    free: list[int] = []
    later: list[int] = []
    for number, step in enumerate(schedule.steps):
        written, read = touched(step)
        dying = [b for b in dict.fromkeys(read) if b in plan.places and last_use[b] == number]
        for buffer in written:
            if buffer.kind != "temporary" or buffer in plan.places:
                continue
            own = buffer in private
            donor = _donor(step, buffer, [b for b in dying if (b in private) == own])
            if donor is not None:
                dying.remove(donor)
                plan.in_place.append(buffer)
                plan.places[buffer] = plan.places[donor]
            else:
                plan.places[buffer] = _take(plan, free, buffer, hints, own)
        ended = [plan.places[b] for b in dying]
        ended += [plan.places[b] for b in written if b in plan.places and last_use[b] == number]
        if written and all(buffer in private for buffer in written):
            # No barrier may follow: another worker may still read it while this one is two steps further.
            later += ended
        else:
            free += ended + later
            later = []
    return plan


def _take(plan: Plan, free: list[int], buffer: Buffer, hints: Mapping[sympy.Symbol, int], private: bool) -> int:
    """The free slot that fits best, or a new one."""
    usable = [i for i in free if plan.slots[i].private == private]
    size, hint = sympy.expand(buffer.num_bytes), _at(buffer.num_bytes, hints)
    # A slot that held this very size before; else the one that grows or wastes least.
    best = min(usable, key=lambda i: (size not in plan.slots[i].sizes, abs(plan.slots[i].hint - hint)), default=None)
    if best is not None and size not in plan.slots[best].sizes and not _worth(plan.slots[best].hint, hint):
        best = None
    if best is None:
        plan.slots.append(Slot(private=private))
        best = len(plan.slots) - 1
    else:
        free.remove(best)
    slot = plan.slots[best]
    if size not in slot.sizes:
        slot.sizes.append(size)
    slot.hint = max(slot.hint, hint)
    return best


def _worth(have: int, wanted: int) -> bool:
    """Sharing pays unless the slot would have to grow to many times its size."""
    return wanted <= 8 * have


def _at(size: sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> int:
    return int(size.xreplace({s: sympy.Integer(hints.get(s, 8)) for s in size.free_symbols}))


def _donor(step: Kernel | TemplateCall, buffer: Buffer, dying: Sequence[Buffer]) -> Buffer | None:
    """An operand whose memory the result may take: as large, last used here, and read where the result is written."""
    if not isinstance(step, Kernel) or len(step.stores()) != 1 or not _elementwise(step):
        return None
    store = step.stores()[0]
    for candidate in dying:
        if ITEM_BYTES[candidate.dtype] != ITEM_BYTES[buffer.dtype] or sympy.expand(candidate.numel - buffer.numel) != 0:
            continue
        own = [load for load in loads(store.value) if load.buffer is candidate]
        if own and all(sympy.expand(load.offset - store.offset.expr) == 0 for load in own):
            return candidate
    return None


def _elementwise(kernel: Kernel) -> bool:
    """True where nothing but the one store happens: no reduction reads ahead of the writes."""
    from irc.lowering.kernels.kernel import Loop, statements

    return all(isinstance(statement, (Loop, Store)) for statement in statements(kernel.body))
