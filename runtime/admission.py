"""What an engine has room for: blocks of cache for its memory, and the requests that fit in them."""

from __future__ import annotations

from irc.core.errors import OptionError
from irc.core.paged import PagedModel
from irc.runtime.requests import Request

_DEFAULT_MEMORY = 1 << 30


def blocks_of_cache(model: PagedModel, memory_bytes: int | None, wanted: int) -> int:
    """How many blocks of keys and values to hold: `wanted`, or what fits into the memory (None: 1 GiB).

    Raises:
        OptionError: the memory that was given does not hold a single block.
    """
    size = model.block_bytes
    found = min(wanted, (_DEFAULT_MEMORY if memory_bytes is None else memory_bytes) // size)
    if memory_bytes is None:
        return max(found, -(-model.max_length // model.block_size))
    if found < 1:
        raise OptionError(f"memory_bytes={memory_bytes} does not hold one block of {size} bytes")
    return found


def why_not_served(request: Request, model: PagedModel, num_blocks: int) -> list[str]:
    """Everything that is wrong with a request, as the one who sent it would say it; empty: it can be served."""
    size, limit, problems = model.vocabulary_size, model.max_length, []
    wrong = [token for token in request.prompt if not 0 <= token < size]
    if not request.prompt:
        problems.append("the prompt is empty: it has no token to go on from")
    elif wrong:
        problems.append(f"the prompt has token {wrong[0]}; ids run from 0 to {size - 1}")
    elif len(request.prompt) > limit:
        problems.append(f"the prompt has {len(request.prompt)} tokens, the cache holds at most {limit}")
    if request.max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
    if request.num_samples < 1:
        problems.append(f"the number of samples must be at least 1, not {request.num_samples}")
    biased = [token for token, _ in request.sampling.logit_bias if token >= size]
    if biased:
        problems.append(f"logit_bias names token {biased[0]}; ids run from 0 to {size - 1}")
    longest = min(len(request.prompt) + request.max_new_tokens - 1, limit)
    needed = -(-longest // model.block_size)
    if not problems and needed > num_blocks:
        problems.append(
            f"it can grow to {longest} tokens, which take {needed * model.block_bytes} bytes of cache;"
            f" the engine has {num_blocks * model.block_bytes}: ask for fewer tokens or give more memory"
        )
    return problems
