"""Recurrent layers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECT: dict[str, Callable[..., Any]] = {}

_Step = Callable[[Tensor, list[Tensor]], list[Tensor]]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    known = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "softsign": F.softsign}
    if name.lower() not in known:
        raise NotImplementedError(f"the activation {name} of a recurrent layer")
    return known[name.lower()]


def _unroll(
    x: Tensor,
    steps: Sequence[_Step],
    starts: Sequence[list[Tensor]],
    direction: str,
    layout: int,
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run one step function for each direction; gives all hidden states and the last states.

    Sequences that end early keep their state, and their outputs after the end are zero.
    """
    x = x.transpose(0, 1) if layout else x
    count = x.shape[0]
    every, last = [], []
    for index, (step, states) in enumerate(zip(steps, starts, strict=True)):
        backward = direction == "reverse" or index == 1
        seen: list[Tensor] = []
        for time in range(count - 1, -1, -1) if backward else range(count):
            following = step(x[time], states)
            if lengths is None:
                states = following
                seen.append(states[0])
            else:
                running = (time < lengths.to(x.device))[:, None]
                states = [torch.where(running, new, old) for new, old in zip(following, states, strict=True)]
                seen.append(torch.where(running, states[0], 0))
        every.append(torch.stack(seen[::-1] if backward else seen))
        last.append(states)
    outputs = torch.stack(every, 1)
    finals = [torch.stack(parts) for parts in zip(*last, strict=True)]
    if layout:
        return (outputs.permute(2, 0, 1, 3), *[final.transpose(0, 1) for final in finals])
    return (outputs, *finals)


def _starts(x: Tensor, given: Sequence[Tensor | None], directions: int, hidden: int, layout: int) -> list[list[Tensor]]:
    batch = x.shape[0] if layout else x.shape[1]
    starts = []
    for index in range(directions):
        states = []
        for state in given:
            if state is None:
                states.append(x.new_zeros(batch, hidden))
            else:
                states.append(state[:, index] if layout else state[index])
        starts.append(states)
    return starts


def _biases(bias: Tensor | None, index: int, gates: int, hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    if bias is None:
        zero = like.new_zeros(gates * hidden)
        return zero, zero
    first, second = bias[index].chunk(2)
    return first, second


def RNN(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """A plain recurrent layer."""
    directions, hidden = weight.shape[0], recurrence.shape[2]
    names = list(activations or ["Tanh"] * directions)

    def step_of(index: int) -> _Step:
        activate = _activation(names[index])
        first, second = _biases(bias, index, 1, hidden, x)

        def step(value: Tensor, states: list[Tensor]) -> list[Tensor]:
            total = F.linear(value, weight[index], first) + F.linear(states[0], recurrence[index], second)
            return [activate(total if clip is None else total.clamp(-clip, clip))]

        return step

    starts = _starts(x, [initial_h], directions, hidden, layout)
    return _unroll(x, [step_of(index) for index in range(directions)], starts, direction, layout, sequence_lens)


def GRU(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """A gated recurrent layer; gates in the order update, reset, hidden."""
    directions, hidden = weight.shape[0], recurrence.shape[2]
    names = list(activations or ["Sigmoid", "Tanh"] * directions)

    def bounded(total: Tensor) -> Tensor:
        return total if clip is None else total.clamp(-clip, clip)

    def step_of(index: int) -> _Step:
        gate, activate = _activation(names[2 * index]), _activation(names[2 * index + 1])
        first, second = _biases(bias, index, 3, hidden, x)
        gates_of_state, hidden_of_state = recurrence[index].split_with_sizes([2 * hidden, hidden])
        gates_bias, hidden_bias = second.split_with_sizes([2 * hidden, hidden])

        def step(value: Tensor, states: list[Tensor]) -> list[Tensor]:
            state = states[0]
            gates_in, hidden_in = F.linear(value, weight[index], first).split_with_sizes([2 * hidden, hidden], -1)
            gates = gate(bounded(gates_in + F.linear(state, gates_of_state, gates_bias)))
            update, reset = gates.chunk(2, -1)
            if linear_before_reset:
                inner = reset * F.linear(state, hidden_of_state, hidden_bias)
            else:
                inner = F.linear(reset * state, hidden_of_state, hidden_bias)
            return [(1 - update) * activate(bounded(hidden_in + inner)) + update * state]

        return step

    starts = _starts(x, [initial_h], directions, hidden, layout)
    return _unroll(x, [step_of(index) for index in range(directions)], starts, direction, layout, sequence_lens)


def LSTM(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """A long short-term memory; gates in the order input, output, forget, cell."""
    directions, hidden = weight.shape[0], recurrence.shape[2]
    names = list(activations or ["Sigmoid", "Tanh", "Tanh"] * directions)

    def bounded(total: Tensor) -> Tensor:
        return total if clip is None else total.clamp(-clip, clip)

    def step_of(index: int) -> _Step:
        gate, squash, show = (_activation(name) for name in names[3 * index : 3 * index + 3])
        first, second = _biases(bias, index, 4, hidden, x)
        peep = x.new_zeros(3 * hidden) if peepholes is None else peepholes[index]
        peep_input, peep_output, peep_forget = peep.chunk(3)

        def step(value: Tensor, states: list[Tensor]) -> list[Tensor]:
            state, cell = states
            total = F.linear(value, weight[index], first) + F.linear(state, recurrence[index], second)
            enter, leave, forget, content = total.chunk(4, -1)
            opened = gate(bounded(enter + peep_input * cell))
            kept = 1 - opened if input_forget else gate(bounded(forget + peep_forget * cell))
            cell = kept * cell + opened * squash(bounded(content))
            return [gate(bounded(leave + peep_output * cell)) * show(cell), cell]

        return step

    starts = _starts(x, [initial_h, initial_c], directions, hidden, layout)
    return _unroll(x, [step_of(index) for index in range(directions)], starts, direction, layout, sequence_lens)
