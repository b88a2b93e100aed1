"""check_policy: what every method must do right, checked on a tiny random decoder in memory.

    from zipvl.testing import check_policy
    check_policy(Mine, ratio=0.3)                              # silent, or one sentence
    check_policy(Mine, ratio=0.3, everything={"ratio": 1.0})   # the latter must equal dense

Needs neither a checkpoint nor pytest, and takes a second or two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy
from .oracle import Oracle
from .toy import ROOM, Prompt, Toy, Trace, expect

LOSS = 0.7  # of a key's or value's size, the most that a lossy cache may change it
NEAR = 0.1  # of the largest hidden state: how far a lossy cache that keeps all may be from dense
EDGES = ((1, "none"), (1, "all"), (2, "none"), (7, "all"), (7, "none"), (30, "some"), (30, "all"))


def check_policy(
    make: Callable[..., Policy], /, everything: dict[str, Any] | None = None, **options: Any
) -> None:
    """Raises AssertionError if the method `make(**options)` breaks the contract of policy.py, or
    UsageError where what a verb returns is nothing that the engine could use.

    make: a Policy class, or any function that builds one. everything: options under which the
    method keeps all tokens everywhere; with them it must equal dense (None: not checked). A
    quantising method is held to exact arithmetic over what its cache holds, and to hold it roughly.
    """
    for groups, length, kind in ((1, 23, {}), (4, 40, {"normed": True}), (2, 150, {"rows": True})):
        toy = Toy.build(4, groups, **kind)
        check_arithmetic(toy, make(**options), toy.prompt(length))
    if everything is not None:
        check_dense(toy, make(**options | everything), toy.prompt(80))
    check_lengths(toy, make(**options))
    check_memory(toy, make(**options))
    check_batch(toy, make(**options))
    check_seed(toy, lambda: make(**options))


def check_arithmetic(toy: Toy, policy: Policy, prompt: Prompt) -> None:
    """Prefill and decode steps equal a masked dense decoder in float64 under the same plans."""
    got, oracle, turns = toy.run(policy, [prompt]), Oracle(toy.decoder), toy.turns(prompt[1])
    table, layers = toy.decoder.embed_tokens.weight, toy.decoder.config.num_layers
    want = oracle.prefill(
        table[prompt[0]], got.seen.plans, got.seen.started, got.seen.trims, turns
    )  # fmt: skip
    close(got.hidden[0], want, "prefill", "the plan is not what the layer can compute")
    for step, token in enumerate(got.tokens[0]):
        if policy.storage is not None:
            check_held(oracle, got.held[step], f"{policy}: before decode step {step}")
        plans = got.seen.steps[step * layers : (step + 1) * layers]
        first = got.notes[0].at(got.notes[0].prompt) if turns is None else int(turns.max()) + 1
        want = oracle.step(table[token][None], first + step, plans)
        why = "the cache holds other tokens than plan(), trim() and step() named"
        close(got.hidden[step + 1], want, f"decode step {step}", why)


def check_held(oracle: Oracle, held: list[tuple[Tensor, Tensor, Tensor]], where: str) -> None:
    """A lossy cache holds the right tokens, roughly; the oracle goes on with what it holds."""
    for layer, (k, v, places) in enumerate(held):
        order = places.argsort(dim=0)[:, :, None].expand(k.shape)
        error = oracle.correct(layer, k.gather(0, order), v.gather(0, order))
        expect(
            error < LOSS,
            f"{where}, layer {layer} is off by {error:.0%} of what was stored: it holds other "
            "tokens than plan() named, or too few bits a number",
        )


def check_dense(toy: Toy, policy: Policy, prompt: Prompt) -> None:
    """A method told to keep everything is dense attention."""
    got, want = toy.run(policy, [prompt]), toy.run(Policy(), [prompt])
    entered = [len(prompt[0])] * toy.decoder.config.num_layers
    kept = [counts[0] for counts in got.prefilled]
    expect(
        kept == entered,
        f"{policy}: told to keep everything, its layers cache {kept} of {entered} tokens: check "
        "how it rounds, and that no token is left out on purpose",
    )
    limit = 1e-3 if policy.storage is None else NEAR
    for step, (one, other) in enumerate(zip(got.hidden, want.hidden, strict=True)):
        where = f"decode step {step - 1}" if step else "prefill"
        why = f"{policy} must equal dense when it keeps all"
        close(one, other, where, why, limit if step else 1e-3)
    same(got, want, f"{policy}: keeps everything, but generates other tokens than dense attention")


def check_lengths(toy: Toy, policy: Policy) -> None:
    """Prompts of one token and more; of text only, pictures only, and both."""
    for length, visual in EDGES:
        what = f"{policy}: on a prompt of {length} tokens ({visual} of them visual)"
        try:
            got = toy.run(policy, [toy.prompt(length, visual)], steps=3)
        except AssertionError:
            raise
        except Exception as e:
            why = "clamp what it selects to the prompt's length"
            raise AssertionError(f"{what} it fails with {type(e).__name__}: {e}; {why}") from e
        finite = all(bool(torch.isfinite(h).all()) for h in got.hidden)
        expect(finite, f"{what} the hidden states are NaN or infinite: a score divides by zero")


@torch.inference_mode()
def check_memory(toy: Toy, policy: Policy) -> None:
    """Caches occupy the kept slots and the room, nothing more, and hold no token twice."""
    got = toy.run(policy, [toy.prompt(90), toy.prompt(41)])
    G, D = toy.decoder.config.num_kv_heads, toy.decoder.config.head_dim
    for layer, (cache, counts) in enumerate(zip(got.caches, got.prefilled, strict=True)):
        want = 0
        for count, plan in zip(counts, got.seen.plans[2 * layer :], strict=False):
            precise = count if plan.precise is None else len(plan.precise)
            full = 2 * (count + min(ROOM, plan.room or ROOM)) * G * D * 4
            form = policy.storage
            want += form.nbytes(precise, count - precise, ROOM, G, D, 4) if form else full
        expect(
            got.bytes[layer] == want,
            f"{policy}: layer {layer} keeps {counts} tokens but occupies {got.bytes[layer]} bytes, "
            f"not {want}: the engine stored more than the plan names",
        )
        for b, length in enumerate((90, 41)):
            places = cache.places(b).sort(dim=0).values  # of tokens, without summaries
            expect(
                bool((places.diff(dim=0) > 0).all()) and int(places.max()) < length + ROOM,
                f"{policy}: layer {layer} holds a token twice, or one that never was",
            )


def check_batch(toy: Toy, policy: Policy) -> None:
    """Prompts A, B, A one after the other, and A, B, C in one batch, all give the same answers."""
    prompts = [toy.prompt(n, v) for n, v in ((64, "some"), (9, "none"), (140, "some"))]
    first, *alone = (toy.run(policy, [p]) for p in (prompts[0], *prompts))
    same(
        alone[0],
        first,
        f"{policy}: the same prompt gives another answer the second time: keep notes in "
        "view.notes, not on the policy, and seed random choices in each call",
    )
    same(
        toy.run(policy, prompts),
        *alone,
        f"{policy}: a batch gives other answers than its prompts one by one: notes of one sequence "
        "reach another, or a choice depends on how often plan() was called",
    )


def check_seed(toy: Toy, make: Callable[[], Policy]) -> None:
    """Two policies of the same options choose alike."""
    one, two = (toy.run(make(), [toy.prompt(140)]) for _ in range(2))
    same(one, two, f"{make()}: two runs with the same options differ: seed every random choice")


def same(got: Trace, *rest: Any) -> None:
    """`got` has the tokens and cache lengths of the traces before the last argument, a sentence."""
    *wants, sentence = rest
    tokens = [t for want in wants for t in want.tokens]
    cached = [[n for want in wants for n in want.prefilled[i]] for i in range(len(got.prefilled))]
    after = [[n for w in wants for n in w.caches[i].spans.lengths] for i in range(len(got.caches))]
    lengths = [cache.spans.lengths for cache in got.caches]
    expect(got.tokens == tokens and got.prefilled == cached and lengths == after, sentence)


def close(got: Tensor, want: Tensor, where: str, why: str, limit: float = 1e-3) -> None:
    """Equal to `limit` of the largest value."""
    expect(got.shape == want.shape, f"{where}: {len(got)} tokens left, not {len(want)}: {why}")
    error = float((got.double() - want).abs().max() / want.abs().max())
    expect(error < limit, f"{where}: off by {error:.1e} of the largest value: {why}")
