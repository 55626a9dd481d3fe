"""The causal transformer: it looks at nothing that comes later, and is torch's own where the two are alike."""

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.data.dataset import Samples
from ssfl_app.data.transform import AsTheyAre
from ssfl_app.sparsity.layout import Layout, mask_everything, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.step import LocalOptions
from ssfl_app.training.tasks import NextToken
from ssfl_app.training.trainer import LocalTrainer
from ssfl_app.training.transformer import Transformer

LENGTH, TOKENS = 12, 20


def made(**options):
    return create(ModelOptions("transformer", width=0.5, options=options), (LENGTH,), TOKENS, seed=1).eval()


def text(count=6, seed=1):
    return torch.randint(TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_no_output_depends_on_a_later_token():
    model, before = made(), text()
    for place in range(LENGTH):
        after = before.clone()
        after[:, place] = (after[:, place] + 1) % TOKENS
        changed = (model(before) != model(after)).flatten(2).any(dim=2).any(dim=0)
        assert not changed[:place].any()
        assert changed[place:].all()


def test_a_block_is_torchs_own_with_the_same_weights():
    block = made(depth=1).blocks[0]
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    state = {"linear1": block.rise, "linear2": block.fall, "norm1": block.norm1, "norm2": block.norm2}
    ours = {f"{name}.{n}": w for name, module in state.items() for n, w in module.state_dict().items()}
    for part in ("weight", "bias"):
        stacked = [getattr(projection, part) for projection in (block.query, block.key, block.value)]
        ours |= {
            f"self_attn.in_proj_{part}": torch.cat(stacked),
            f"self_attn.out_proj.{part}": getattr(block.out, part),
        }
    theirs.load_state_dict(ours)
    x, later = (
        torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(2)),
        torch.ones(LENGTH, LENGTH).triu(1),
    )
    with torch.no_grad():
        torch.testing.assert_close(block(x), theirs(x, src_mask=later.bool()), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding_and_travels_once():
    tied, own = made(tied=True), made()
    assert sum(w.numel() for w in own.parameters()) - sum(w.numel() for w in tied.parameters()) == 33 * TOKENS
    assert not any("head" in name for name in state_of(tied))
    assert tied(text()).shape == own(text()).shape == (6, LENGTH, TOKENS)
    tied(text()).sum().backward()
    assert tied.tokens.weight.grad.abs().min() > 0  # the head uses every row


def test_embeddings_are_never_pruned_unless_dead_weights_are_frozen():
    model = made()
    names = {"query", "key", "value", "out", "rise", "fall"}
    wanted = {f"blocks.{block}.{name}.weight" for block in range(2) for name in names} | {"head.weight"}
    assert set(Layout.of(model).prunable) == wanted
    mask_everything(model)
    assert set(Layout.of(model).prunable) == wanted | {"tokens.weight", "places.weight"}


def test_it_learns_under_a_mask_with_frozen_weights():
    model, x = made(), text(32)
    mask_everything(model)
    layout, before = Layout.of(model), {name: w.clone() for name, w in state_of(model).items()}
    mask = Mask.random(layout, 0.1, np.random.default_rng(1))
    options = LocalOptions(epochs=5, batch_size=8, lr=0.3, momentum=0.9, weight_decay=0.01)
    trainer = LocalTrainer(options, AsTheyAre(), torch.device("cpu"), task=NextToken())
    data, rng = Samples(x, x), np.random.default_rng(1)  # each token is to be told of itself
    first, _ = trainer.evaluate(model, data)
    trainer.fit(model, data, rng, lr=0.3, mask=mask, frozen=True)
    last, share = trainer.evaluate(model, data)
    assert last < 0.5 * first
    assert share > 0.5
    for name, alive in mask.tensors().items():
        assert torch.equal(state_of(model)[name][~alive], before[name][~alive])


@pytest.mark.parametrize(
    ("heads", "depth", "words"), [(3, 1, "do not divide"), (0, 1, "do not"), (4, 0, "at least 1")]
)
def test_what_makes_no_transformer_is_refused(heads, depth, words):
    with pytest.raises(ValueError, match=words):
        Transformer(LENGTH, TOKENS, 32, depth, heads)
