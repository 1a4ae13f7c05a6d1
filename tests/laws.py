"""Laws that every quantiser satisfies, and comparisons of states.

A quantiser's tests subclass :class:`Material`, which says what to build and in which layout, together with the laws
that its code path needs: :class:`QuantizerLaws` has them all. A variant that changes one policy takes only the laws
that this policy can break.

Inputs are trees: a tensor for a codebook, a list of tensors for a quantiser of several maps.
"""

import copy
import io
import pickle
from typing import ClassVar

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from vqssl.functional import unit

IGNORE_RANDOM_CODES = pytest.mark.filterwarnings("ignore:.*quantises by random codes")
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def state_of(module):
    """Return a copy of everything that a checkpoint would hold."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(found, expected):
    """Assert that two states, or two trees of tensors, agree in dtype, shape and every bit (NaN equals NaN)."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_differs(found, expected):
    """Assert that two states differ somewhere: a test of equality is worth nothing where nothing happened."""
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def through_file(thing):
    """Return `thing` after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def correlation(x):
    """Map to the form in which Pearson correlation compares: a metric that is given as a function."""
    return unit(x - x.mean(-1, keepdim=True))


class Material:
    """Quantisers and batches for the laws; `make(**options)` returns a quantiser in training mode, with a revival.

    `shapes` are the leading shapes of the maps, tokens last; a quantiser with channels first overrides `from_tokens`
    and `to_tokens`.
    """

    dim = 6
    codebook_size = 12
    shapes: tuple[tuple[int, ...], ...] = ((5, 9),)
    widths: tuple[int, ...] | None = None
    """Channels of each map where they are not `dim`."""
    options: ClassVar[dict[str, object]] = {}
    """Options that `make` takes by default."""
    bitwise = True
    """False where a matrix product before the codes may round differently for another number of rows."""

    # ---- to be provided ----

    def make(self, **options):
        raise NotImplementedError

    def codebooks(self, module):
        """Return one codebook a scale."""
        return [module]

    # ---- to be adapted ----

    def pack(self, maps):
        """Return what the quantiser takes, from a list with one entry a scale."""
        return maps[0]

    def unpack(self, tree):
        return [tree]

    def from_tokens(self, maps):
        """Return tokens `(*batch, C)` in the layout of the quantiser."""
        return self.pack(maps)

    def to_tokens(self, tree):
        return self.unpack(tree)

    def projected(self, module, tokens):
        """Return what the codes replace: differentiable, without the code of the quantiser."""
        return list(tokens)

    def expected_gradient(self, tokens, codes, cotangent):
        """Return the gradient of the tokens, given that of the quantised ones."""
        return cotangent

    def of_codes(self, module, scale, codes):
        """Return tokens that lie where `codes` lie."""
        return codes

    def ready_for(self, module, dtype):
        """Return `module` so that it takes input of `dtype`; only the state of a codebook must not need this."""
        return module

    # ---- batches ----

    def tokens(self, step=0, shapes=None):
        """Return clustered tokens whose clusters move on with the step, so that some codes die and are revived."""
        generator = torch.Generator().manual_seed(1000 + step)
        found = []
        for scale, shape in enumerate(shapes or self.shapes):
            width = self.widths[scale] if self.widths else self.dim
            centres = torch.randn(5, width, generator=torch.Generator().manual_seed(step // 2 + 50 * scale))
            choice = torch.randint(5, shape, generator=generator)
            found.append(2 * centres[choice] + 0.1 * torch.randn(*shape, width, generator=generator))
        return found

    def batch(self, step=0):
        return self.from_tokens(self.tokens(step))

    def mask(self, step=0):
        generator = torch.Generator().manual_seed(2000 + step)
        return [torch.rand(shape, generator=generator) < 0.6 for shape in self.shapes]

    def trained(self, steps=3, **options):
        module = self.make(**options)
        for step in range(steps):
            module(self.batch(step))
        return module

    def close(self, found, expected, **tolerance):
        if self.bitwise and not tolerance:
            tolerance = {"rtol": 0, "atol": 0}
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


class ValueLaws(Material):
    """Outputs, losses and gradients; the order of the codes."""

    @pytest.mark.parametrize("training", [True, False])
    def test_output_is_the_looked_up_code(self, training):
        module = self.trained().train(training)
        before = copy.deepcopy(module)
        out = module(self.batch(7))
        for codebook, indices, quantized in zip(
            self.codebooks(before), self.unpack(out.indices), self.to_tokens(out.quantized), strict=True
        ):
            assert indices.dtype == torch.int64
            assert indices.min() >= 0
            assert indices.max() < codebook.codebook_size
            assert_same_bits(quantized, codebook.lookup(indices))
            assert_same_bits(quantized, codebook.embed[indices])

    def test_each_token_gets_its_nearest_code(self):
        module = self.trained().eval()
        out = module(self.batch(7))
        tokens = self.projected(module, self.tokens(7))
        for codebook, z, indices in zip(self.codebooks(module), tokens, self.unpack(out.indices), strict=True):
            distances = (z[..., None, :].double() - codebook.embed.double()).square().sum(-1)
            assert torch.equal(indices, distances.argmin(-1))

    def test_commitment_loss_is_the_mean_over_all_elements(self):
        module = self.trained(commitment_weight=0.7).eval()
        out = module(self.batch(7))
        expected = 0.0
        tokens = self.projected(module, self.tokens(7))
        for codebook, z, indices in zip(self.codebooks(module), tokens, self.unpack(out.indices), strict=True):
            expected += 0.7 * (z.double() - codebook.embed.double()[indices]).square().mean().item()
        assert out.commitment_loss.item() == pytest.approx(expected, rel=1e-6)

    def test_code_is_quantised_to_itself(self):
        module = self.trained(steps=1).eval()
        maps = [self.of_codes(module, scale, codebook.embed) for scale, codebook in enumerate(self.codebooks(module))]
        out = module(self.from_tokens(maps))
        for codebook, indices, quantized in zip(
            self.codebooks(module), self.unpack(out.indices), self.to_tokens(out.quantized), strict=True
        ):
            # Among equal codes the lowest index wins.
            same = (codebook.embed[:, None] == codebook.embed).all(-1)
            assert torch.equal(indices, same.long().argmax(-1))
            assert torch.equal(quantized, codebook.embed)

    @pytest.mark.parametrize("training", [True, False])
    def test_gradient_reaches_the_tokens(self, training):
        module = self.trained().train(training)
        tokens = [z.requires_grad_() for z in self.tokens(7)]
        out = module(self.from_tokens(tokens))
        quantized = self.to_tokens(out.quantized)
        cotangents = [torch.randn_like(q) for q in quantized]
        torch.autograd.backward(quantized, cotangents)
        found = [z.grad for z in tokens]

        again = [z.detach().clone().requires_grad_() for z in tokens]
        replaced = self.projected(module, again)
        carried = [
            self.expected_gradient(z.detach(), q.detach(), g)
            for z, q, g in zip(replaced, quantized, cotangents, strict=True)
        ]
        torch.autograd.backward(replaced, carried)
        for a, z in zip(found, again, strict=True):
            torch.testing.assert_close(a, z.grad, rtol=1e-5, atol=1e-5)

    def test_commitment_gradient_reaches_tokens_and_not_codes(self):
        module = self.trained(commitment_weight=1.0).eval()
        tokens = [z.requires_grad_() for z in self.tokens(7)]
        out = module(self.from_tokens(tokens))
        out.commitment_loss.backward()
        again = [z.detach().clone().requires_grad_() for z in tokens]
        loss = sum(
            (z - q.detach()).square().mean()
            for z, q in zip(self.projected(module, again), self.to_tokens(out.quantized), strict=True)
        )
        loss.backward()
        for a, b in zip(tokens, again, strict=True):
            assert a.grad.abs().sum() > 0
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        assert not any(buffer.requires_grad for buffer in module.buffers())

    def test_permuting_codes_permutes_indices_and_nothing_else(self):
        a = self.trained(2, revival=None).double()
        b = copy.deepcopy(a)
        orders = []
        done = set()
        for seed, (first, second) in enumerate(zip(self.codebooks(a), self.codebooks(b), strict=True)):
            order = torch.randperm(first.codebook_size, generator=torch.Generator().manual_seed(seed))
            if id(second) in done:  # a shared codebook is permuted once
                order = orders[0]
            else:
                codes = first.embed.clone()
                first.set_codes_(codes)
                second.set_codes_(codes[order])
                done.add(id(second))
            orders.append(order)
        for step in range(3):
            x = tree_map(torch.Tensor.double, self.batch(step))
            found, expected = b(x), a(x)
            torch.testing.assert_close(found.quantized, expected.quantized, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.commitment_loss, expected.commitment_loss, rtol=1e-12, atol=0)
            for order, k, expected_k in zip(
                orders, self.unpack(found.indices), self.unpack(expected.indices), strict=True
            ):
                assert torch.equal(order[k], expected_k)
        for order, first, second in zip(orders, self.codebooks(a), self.codebooks(b), strict=True):
            for name in ("embed", "cluster_size", "embed_avg"):
                torch.testing.assert_close(getattr(second, name), getattr(first, name)[order], rtol=1e-12, atol=1e-12)


class StateLaws(Material):
    """Checkpoints, copies, modes and random numbers."""

    def test_training_moves_the_state_and_revives_codes(self):
        # Without this the laws below would hold for a quantiser that does nothing.
        fresh, trained, unrevived = state_of(self.make()), self.trained(6), self.trained(6, revival=None)
        assert_differs(state_of(trained), fresh)
        assert_differs(state_of(trained), state_of(unrevived))

    @pytest.mark.parametrize("steps", [0, 4])
    def test_loaded_state_continues_bit_for_bit(self, steps):
        module = self.trained(steps)
        # The loaded seed counts, not that of construction.
        resumed = self.make(seed=99)
        resumed.load_state_dict(through_file(module.state_dict()))
        assert_same_bits(state_of(resumed), state_of(module))
        for step in range(steps, steps + 5):
            assert_same_bits(resumed(self.batch(step)), module(self.batch(step)))
        assert_same_bits(state_of(resumed), state_of(module))

    def test_uninitialised_state_loaded_into_a_trained_quantiser_initialises_again(self):
        fresh, other = self.make(), self.trained()
        other.load_state_dict(through_file(fresh.state_dict()))
        other(self.batch(4))
        fresh(self.batch(4))
        assert_same_bits(state_of(other), state_of(fresh))

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_are_equal_and_independent(self, how):
        module = self.trained()
        copied = how(module)
        before = state_of(module)
        assert_same_bits(state_of(copied), before)
        copied(self.batch(3))
        assert_same_bits(state_of(module), before)
        module(self.batch(3))
        assert_same_bits(state_of(copied), state_of(module))

    def test_reset_after_meta_equals_construction(self):
        module = self.make(device="meta")
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        module.to_empty(device="cpu")
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        for found, expected in zip(self.codebooks(module), self.codebooks(self.make()), strict=True):
            assert_same_bits(state_of(found), state_of(expected))
        module(self.batch())
        assert all(codebook.initialized for codebook in self.codebooks(module))

    @pytest.mark.parametrize("steps", [0, 3])
    @IGNORE_RANDOM_CODES
    def test_eval_changes_nothing(self, steps):
        module = self.trained(steps).eval()
        before = state_of(module)
        module(self.batch(7))
        assert_same_bits(state_of(module), before)

    @pytest.mark.parametrize("steps", [0, 3])
    @IGNORE_RANDOM_CODES
    def test_frozen_changes_nothing_in_training(self, steps):
        module = self.trained(steps)
        before = state_of(module)
        assert module.freeze() is module
        expected = copy.deepcopy(module).eval()(self.batch(7))
        assert_same_bits(module(self.batch(7)), expected)
        module.train()
        module(self.batch(8))
        assert_same_bits(state_of(module), before)
        module.freeze(False)
        module(self.batch(7))
        assert_differs(state_of(module), before)

    @pytest.mark.parametrize("stop", [lambda module: module.eval(), lambda module: module.freeze()])
    def test_warns_once_of_random_codes_at_the_line_of_the_call(self, stop):
        module = stop(self.make())
        with pytest.warns(UserWarning, match="random codes.*Call it once in training mode.* or load a state") as caught:
            module(self.batch())
        assert [warning.filename for warning in caught] == [__file__]
        module(self.batch())  # a second warning would be an error here

    def test_loaded_codes_do_not_warn(self):
        module = self.make().eval()
        module.load_state_dict(self.trained(1).state_dict())
        module(self.batch())

    def test_global_generators_are_neither_read_nor_advanced(self):
        module = self.make()
        start = state_of(module)
        states = []
        for seed in (1, 2):
            module.load_state_dict(start)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            for step in range(4):
                module(self.batch(step))
            assert torch.equal(torch.get_rng_state(), before)
            states.append(state_of(module))
        assert_same_bits(*states)

    def test_another_seed_draws_other_codes(self):
        a, b = self.make(), self.make(seed=5)
        for first, second in zip(self.codebooks(a), self.codebooks(b), strict=True):
            assert not torch.equal(first.embed, second.embed)


class MaskLaws(Material):
    """Masked, missing and non-finite tokens, in training."""

    def test_masked_equals_truncated(self):
        masked, truncated = self.make(), self.make()
        truncated.load_state_dict(masked.state_dict())
        fillings = (*NOT_FINITE, 3e38)
        for step in range(5):
            tokens, masks = self.tokens(step), self.mask(step)
            kept = [z[mask].clone().requires_grad_() for z, mask in zip(tokens, masks, strict=True)]
            for scale, (z, mask) in enumerate(zip(tokens, masks, strict=True)):
                # What a masked token holds must not matter.
                z[~mask] = fillings[(step + scale) % len(fillings)]
                z.requires_grad_()
            out = masked(self.from_tokens(tokens), self.pack(masks))
            short = truncated(self.from_tokens(kept))
            for mask, q, k, expected_q, expected_k in zip(
                masks,
                self.to_tokens(out.quantized),
                self.unpack(out.indices),
                self.to_tokens(short.quantized),
                self.unpack(short.indices),
                strict=True,
            ):
                assert_same_bits(k[mask], expected_k)
                self.close(q[mask], expected_q)
                assert (k[~mask] == -1).all()
                assert (q[~mask] == 0).all()
            torch.testing.assert_close(out.commitment_loss, short.commitment_loss, rtol=1e-6, atol=0)

            for result in (out, short):
                total = result.commitment_loss + sum(q.square().sum() for q in self.to_tokens(result.quantized))
                total.backward()
            for z, mask, expected in zip(tokens, masks, kept, strict=True):
                assert (z.grad[~mask] == 0).all()
                torch.testing.assert_close(z.grad[mask], expected.grad, rtol=1e-5, atol=1e-6)
        for a, b in zip(self.codebooks(masked), self.codebooks(truncated), strict=True):
            self.close(list(state_of(a).values()), list(state_of(b).values()))

    def test_mask_of_ones_equals_no_mask(self):
        a, b = self.make(), self.make()
        b.load_state_dict(a.state_dict())
        ones = self.pack([torch.ones(shape, dtype=torch.bool) for shape in self.shapes])
        for step in range(3):
            found, expected = a(self.batch(step), ones), b(self.batch(step))
            assert_same_bits(found.quantized, expected.quantized)
            assert_same_bits(found.indices, expected.indices)
            torch.testing.assert_close(found.commitment_loss, expected.commitment_loss, rtol=1e-6, atol=0)
        assert_same_bits(state_of(a), state_of(b))

    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("how", ["empty", "fully masked"])
    def test_batch_without_valid_tokens_has_zero_loss_and_changes_nothing(self, how, steps):
        module = self.trained(steps)
        before = state_of(module)
        tokens, masks = self.tokens(7), None
        if how == "empty":
            tokens = [z[:0] for z in tokens]
        else:
            tokens = [torch.full_like(z, float("nan")) for z in tokens]
            masks = self.pack([torch.zeros(shape, dtype=torch.bool) for shape in self.shapes])
        tokens = [z.requires_grad_() for z in tokens]
        out = module(self.from_tokens(tokens), masks)
        assert out.commitment_loss.item() == 0.0
        (out.commitment_loss + sum(q.sum() for q in self.to_tokens(out.quantized))).backward()
        for z in tokens:
            assert torch.equal(z.grad, torch.zeros_like(z))
        assert_same_bits(state_of(module), before)

    def test_non_finite_tokens_change_neither_the_state_nor_other_tokens(self):
        clean, dirty = self.make(), self.make()
        dirty.load_state_dict(clean.state_dict())
        for step in range(6):
            tokens = [z.flatten(0, -2) for z in self.tokens(step)]
            spoilt, where = [], []
            for z in tokens:
                spoilt_z = z.new_empty(len(z) + 3, z.shape[-1])
                is_bad = torch.zeros(len(z) + 3, dtype=torch.bool)
                is_bad[[0, len(z) // 2, len(z) + 2]] = True
                spoilt_z[~is_bad] = z
                spoilt_z[is_bad] = torch.randn(3, z.shape[-1])
                spoilt_z[is_bad, step % self.dim] = NOT_FINITE[step % len(NOT_FINITE)]
                spoilt.append(spoilt_z)
                where.append(is_bad)
            expected = clean(self.from_tokens(tokens))
            out = dirty(self.from_tokens(spoilt))
            for is_bad, k, q, expected_k, expected_q in zip(
                where,
                self.unpack(out.indices),
                self.to_tokens(out.quantized),
                self.unpack(expected.indices),
                self.to_tokens(expected.quantized),
                strict=True,
            ):
                assert (k[is_bad] == -1).all()
                assert q[is_bad].isnan().any(-1).all()
                assert_same_bits(k[~is_bad], expected_k)
                self.close(q[~is_bad], expected_q)
            assert not out.commitment_loss.isfinite()
        for a, b in zip(self.codebooks(dirty), self.codebooks(clean), strict=True):
            self.close(list(state_of(a).values()), list(state_of(b).values()))


class DtypeLaws(Material):
    """Half precision and float64."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_output_has_the_dtype_of_the_input(self, dtype):
        module = self.ready_for(self.trained(), dtype)
        kept = [codebook.embed.clone() for codebook in self.codebooks(module)]
        out = module(tree_map(lambda x: x.to(dtype), self.batch(7)))
        for embed, codebook, q, k in zip(
            kept, self.codebooks(module), self.to_tokens(out.quantized), self.unpack(out.indices), strict=True
        ):
            assert_same_bits(q, embed[k].to(dtype))
            assert codebook.embed.dtype in (torch.float32, torch.float64)
            assert torch.isfinite(codebook.embed).all()
        assert out.commitment_loss.dtype == torch.promote_types(dtype, torch.float32)

    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
    def test_state_is_float32_at_least(self, cast):
        module = self.trained()
        before = [state_of(codebook) for codebook in self.codebooks(module)]
        getattr(module, cast)()
        expected = torch.float64 if cast == "double" else torch.float32
        for codebook, old in zip(self.codebooks(module), before, strict=True):
            for name in ("embed", "cluster_size", "embed_avg"):
                assert getattr(codebook, name).dtype == expected
                assert torch.equal(getattr(codebook, name), old[name].to(expected))
            assert codebook.rng.dtype == torch.int64
            assert codebook.num_updates.dtype == torch.int64
            assert codebook.initialized.dtype == torch.bool
        out = module(tree_map(lambda x: getattr(x, cast)(), self.batch(7)))
        assert {q.dtype for q in self.to_tokens(out.quantized)} == {getattr(torch.ones(()), cast)().dtype}
        assert {codebook.embed.dtype for codebook in self.codebooks(module)} == {expected}


class GraphLaws(Material):
    """torch.compile and torch.export."""

    def test_compiles_to_one_graph_in_eval(self):
        """One graph serves random codes, without a warning, and loaded ones; another serves masks."""
        from torch._dynamo.testing import CompileCounterWithBackend

        module = self.make().eval()
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        compiled(self.batch(7))  # a warning would be an error here
        module.load_state_dict(self.trained().state_dict())
        for number, arguments in enumerate([(self.batch(7),), (self.batch(7), self.pack(self.mask(7)))]):
            found, expected = compiled(*arguments), module(*arguments)
            assert counter.frame_count == number + 1
            assert type(found) is type(expected)
            self.close(found, expected, rtol=1e-6, atol=1e-6)
            assert_same_bits(found.indices, expected.indices)

    def test_compiles_to_one_graph_in_training(self):
        module = self.trained()
        other = copy.deepcopy(module)
        torch._dynamo.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for step in range(3, 6):
            found, expected = compiled(self.batch(step)), module(self.batch(step))
            assert_same_bits(found.indices, expected.indices)
            self.close(found, expected, rtol=1e-6, atol=1e-6)
        for name, tensor in state_of(module).items():
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)

    def test_exports_and_loads(self):
        module = self.trained().eval()
        dynamic = self.pack([{0: torch.export.Dim.DYNAMIC} for _ in self.shapes])
        program = torch.export.export(
            module, (self.batch(7), self.pack(self.mask(7))), dynamic_shapes=(dynamic, copy.deepcopy(dynamic))
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        # Another batch size than that of the example.
        shapes = [(shape[0] + 2, *shape[1:]) for shape in self.shapes]
        x = self.from_tokens(self.tokens(8, shapes))
        mask = self.pack([torch.rand(shape) < 0.6 for shape in shapes])
        expected = module(x, mask)
        for run in (program.module(), loaded):
            found = run(x, mask)
            assert type(found) is type(expected)
            self.close(found, expected, rtol=1e-6, atol=1e-6)
            assert_same_bits(found.indices, expected.indices)


class QuantizerLaws(ValueLaws, StateLaws, MaskLaws, DtypeLaws, GraphLaws):
    """All laws."""
