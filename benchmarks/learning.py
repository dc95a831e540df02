"""One update of a 784 x 500 RBM beside the matrix products that it needs, and beside its peers.

    make bench                                        all benchmarks
    .venv-bench/bin/python benchmarks/learning.py

Contrastive divergence with one step (CD-1) and persistent chains with one (PCD-1), in single
precision, on the same rows again and again: plain gradient descent in place, and the loss, its
gradient and the step of an optimiser, by the fused call and by the general route. Five products of
a batch with W are the least that an update needs; they are timed as one writes them, and into
memory that is at hand, which at batch 100 is often a little quicker. Times are processor time
on one pinned thread, then the clock's time on two; programs take turns, and ratios are medians over
the turns of five set-ups, with their middle half. Where other programs share the cache, the ratios
rise: an update does more beside its products than they do, and finds it cold.

The peers: scikit-learn's BernoulliRBM is PCD-1; rbms 0.5.0 too, with centred gradients scaled to
unit norm unless told otherwise; learnergy 2.0.2 is CD-1, here without the two quantities that it
monitors at every batch.
"""

import argparse
import functools
import math

import timing  # first: it sets the number of threads

import torch
from learnergy.models.bernoulli import RBM as LearnergyRBM
from rbms.bernoulli_bernoulli.classes import BBRBM
from rbms.training.pcd import fit_batch_pcd
from sklearn.neural_network import BernoulliRBM

from companion.data import digits
from companion.models.rbm import RBM
from companion.objectives import PersistentChains, contrastive_divergence

torch.set_num_threads(timing.THREADS)
NUM_VISIBLE, NUM_HIDDEN, RATE = 784, 500, 0.01
NUM_SETUPS = 5  # where memory lies matters, so the programs are set up anew


class Protocol:
    """A machine that offers no fused call, so that objectives take the general route."""

    def __init__(self, rbm):
        self.log_prob, self.gibbs, self.sample_base = rbm.log_prob, rbm.gibbs, rbm.sample_base


def products(n):
    """The five products of an update, and nothing else."""
    v, h = torch.rand(n, NUM_VISIBLE), torch.rand(n, NUM_HIDDEN)
    weights = torch.rand(NUM_VISIBLE, NUM_HIDDEN)

    def run():
        v @ weights
        h @ weights.T
        v @ weights
        v.T @ h
        v.T @ h

    return run


def products_at_hand(n):
    """The same, each into memory that was written before."""
    v, h = torch.rand(n, NUM_VISIBLE), torch.rand(n, NUM_HIDDEN)
    weights, gradient = torch.rand(NUM_VISIBLE, NUM_HIDDEN), torch.rand(NUM_VISIBLE, NUM_HIDDEN)
    x, probs = torch.rand(n, NUM_VISIBLE), torch.rand(n, NUM_HIDDEN)

    def run():
        torch.mm(v, weights, out=probs)
        torch.mm(h, weights.T, out=x)
        torch.mm(v, weights, out=probs)
        torch.mm(v.T, h, out=gradient)
        torch.mm(v.T, h, out=gradient)

    return run


def in_place(v, method):
    g = torch.Generator().manual_seed(0)
    rbm = RBM(NUM_VISIBLE, NUM_HIDDEN, generator=g)
    if method == "CD-1":
        return lambda: rbm.contrastive_update(v, RATE, generator=g)
    chains = PersistentChains(rbm, len(v), generator=g)
    return lambda: chains.update(v, RATE)


def companion(v, method, *, fused, sixteen_bits=False):
    g = torch.Generator().manual_seed(0)
    rbm = RBM(NUM_VISIBLE, NUM_HIDDEN, generator=g)
    model = rbm if fused else Protocol(rbm)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=RATE)
    chains = PersistentChains(model, len(v), generator=g)

    def run():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=sixteen_bits):
            if method == "CD-1":
                loss = contrastive_divergence(model, v, generator=g)
            else:
                loss = chains.loss(v)
        loss.backward()
        optimizer.step()

    return run


def scikit_learn(v):
    rbm = BernoulliRBM(NUM_HIDDEN, learning_rate=RATE, batch_size=len(v), random_state=0)
    rows = v.numpy()
    return lambda: rbm.partial_fit(rows)


def rbms(v):
    weights = 0.01 * torch.randn(NUM_VISIBLE, NUM_HIDDEN)
    rbm = BBRBM(weights, torch.zeros(NUM_VISIBLE), torch.zeros(NUM_HIDDEN))
    optimizer = torch.optim.SGD(rbm.parameters(), lr=RATE, maximize=True)
    for p in rbm.parameters():
        p.grad = torch.zeros_like(p)
    state = {"chains": rbm.init_chains(len(v))}
    batch = (v, torch.ones(len(v)))

    @torch.no_grad()
    def run():
        optimizer.zero_grad(set_to_none=False)
        state["chains"], _ = fit_batch_pcd(batch, state["chains"], rbm, 1, 1.0)
        optimizer.step()

    return run


def learnergy(v):
    rbm = LearnergyRBM(n_visible=NUM_VISIBLE, n_hidden=NUM_HIDDEN, learning_rate=RATE)

    def run():
        visible = rbm.gibbs_sampling(v)[-1].detach()
        cost = torch.mean(rbm.energy(v)) - torch.mean(rbm.energy(visible))
        rbm.optimizer.zero_grad()
        cost.backward()
        rbm.optimizer.step()

    return run


def ten_times(run):
    for _ in range(10):
        run()  # and lets go of what comes back, as a loop that learns does


def programs(v):
    """All that is timed, each with memory of its own."""
    n = len(v)
    return {
        "five products": products(n),
        "five products, memory at hand": products_at_hand(n),
        "companion CD-1, in place": in_place(v, "CD-1"),
        "companion PCD-1, in place": in_place(v, "PCD-1"),
        "companion CD-1": companion(v, "CD-1", fused=True),
        "companion CD-1, general route": companion(v, "CD-1", fused=False),
        "companion PCD-1": companion(v, "PCD-1", fused=True),
        "companion PCD-1, general route": companion(v, "PCD-1", fused=False),
        "scikit-learn (PCD-1)": scikit_learn(v),
        "rbms (PCD-1)": rbms(v),
        "learnergy (CD-1)": learnergy(v),
    }


def sixteen_bit_programs(v):
    """Those that are too slow without instructions of their own to wait for in every turn."""
    return {
        "five products": products(len(v)),
        "companion CD-1": companion(v, "CD-1", fused=True),
        "companion CD-1, bfloat16": companion(v, "CD-1", fused=True, sixteen_bits=True),
    }


def speed(set_up, n, repeats):
    v = (torch.rand(n, NUM_VISIBLE, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    seconds = {}
    for _ in range(NUM_SETUPS):
        runs = {name: functools.partial(ten_times, run) for name, run in set_up(v).items()}
        for name, turns in timing.compare(runs, repeats).items():
            seconds.setdefault(name, []).extend(turns)
    threads = "one thread" if timing.THREADS == 1 else f"{timing.THREADS} threads, by the clock"
    title = f"One update of a {NUM_VISIBLE} x {NUM_HIDDEN} RBM, batch {n}, {threads}"
    timing.report(title, seconds, 10.0, "microseconds", "five products")


def cost_of_sixteen_bits(num_epochs, num_seeds=8):
    """What bfloat16 products cost in likelihood: digits, PCD-1, exact values, paired seeds."""
    train, test, *_ = digits()
    final = {}
    for sixteen_bits in (False, True):
        g = torch.Generator().manual_seed(0)
        rbm = RBM(64, 16, batch_shape=(num_seeds,), generator=g)
        rbm.init_visible_bias(train)
        chains = PersistentChains(rbm, 100, generator=g)
        optimizer = torch.optim.SGD(rbm.parameters(), lr=0.2)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_epochs)
        for _ in range(num_epochs):
            orders = torch.stack(
                [torch.randperm(len(train), generator=g) for _ in range(num_seeds)]
            )
            for rows in orders.split(100, dim=1):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=sixteen_bits):
                    loss = chains.loss(train[rows])
                loss.backward()
                optimizer.step()
            decay.step()
        with torch.no_grad():
            final[sixteen_bits] = rbm.log_prob(test).mean(-1) - rbm.log_z().value
    difference = final[True] - final[False]
    print("\n## Digits (64 x 16), exact test log-likelihood after PCD-1, nats an image\n")
    print(
        f"float32 {final[False].mean():.3f}, bfloat16 products {final[True].mean():.3f}; paired "
        f"difference {difference.mean():+.3f} +/- {difference.std() / math.sqrt(num_seeds):.3f} "
        f"({num_seeds} seeds)"
    )


def main():
    parser = argparse.ArgumentParser(description="Time learning beside its peers.")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    quick = parser.parse_args().quick
    for n, repeats in ((100, 12), (500, 4)):
        speed(programs, n, 1 if quick else repeats)
        speed(sixteen_bit_programs, n, 1)
    if timing.THREADS == 1:
        cost_of_sixteen_bits(5 if quick else 60)
        timing.again_on_two_threads()


if __name__ == "__main__":
    main()
