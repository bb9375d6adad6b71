"""Our GPT is GPT-2: same logits and gradients as Hugging Face's, weights convert both ways."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cleangpt.data.batch import IGNORED
from cleangpt.interchange.gpt import from_huggingface, to_huggingface
from cleangpt.models import build_model
from cleangpt.models.flops import flops_per_token
from cleangpt.models.gpt import GPT, GPTConfig
from tests.losses import next_token

SMALL = GPTConfig(vocab_size=97, max_seq_len=32, n_layers=3, n_heads=4, dim=48)


@pytest.fixture
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_layer=3, n_head=4, n_embd=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_those_of_hugging_face(theirs: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    ours = GPT(SMALL)
    ours.load_state_dict(from_huggingface(SMALL, theirs.state_dict()))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    ours(tokens).logsumexp(-1).sum().backward()
    theirs(tokens).logits.logsumexp(-1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in from_huggingface(SMALL, gradients).items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=1e-3, rtol=1e-3)


def test_weights_convert_to_hugging_face_and_back(theirs: GPT2LMHeadModel, tokens: torch.Tensor) -> None:
    ours = GPT(SMALL)
    converted = to_huggingface(SMALL, ours.state_dict())
    assert not theirs.load_state_dict(converted, strict=False).unexpected_keys
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    back = from_huggingface(SMALL, theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_model_without_biases_converts_to_one_whose_biases_are_zero(theirs: GPT2LMHeadModel) -> None:
    config = GPTConfig(vocab_size=97, max_seq_len=32, n_layers=3, n_heads=4, dim=48, bias=False)
    ours, tokens = GPT(config), torch.arange(20)[None]
    theirs.load_state_dict(to_huggingface(config, ours.state_dict()), strict=False)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)


def test_gpt2_small_has_its_published_size_and_flops() -> None:
    """124,439,808 parameters; 6 N + 12 L d s FLOPs a token with the 786,432 of the positions left out."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, max_seq_len=1024, n_layers=12, n_heads=12, dim=768))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert flops_per_token(model, 1024) == 6 * (124_439_808 - 786_432) + 12 * 12 * 768 * 1024


def test_the_first_loss_is_that_of_a_uniform_guess(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    loss = next_token(GPT(SMALL), tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert abs(loss.item() - torch.log(torch.tensor(97.0)).item()) < 0.1


def test_no_position_sees_a_later_one(tokens: torch.Tensor) -> None:
    model = GPT(SMALL).eval()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])


def test_residual_projections_start_smaller() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, max_seq_len=32, n_layers=8, n_heads=4, dim=256))
    assert abs(model.blocks[0].mlp.down.weight.std().item() - 0.02 / 4) < 1e-4
    assert abs(model.blocks[0].mlp.up.weight.std().item() - 0.02) < 2e-4


def test_dropout_acts_in_training_only(tokens: torch.Tensor) -> None:
    model = GPT(GPTConfig(vocab_size=97, max_seq_len=32, n_layers=2, n_heads=4, dim=48, dropout=0.5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("batch", "seq_len"), [(2, 16), (4, 32)])
def test_estimated_activations_are_those_that_autograd_keeps(batch: int, seq_len: int) -> None:
    """Counts the bytes of every tensor saved for the backward pass, each storage once, weights left out."""
    config = GPTConfig(vocab_size=300, max_seq_len=32, n_layers=4, n_heads=4, dim=64)
    model = GPT(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(300, (batch, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token(model, tokens, tokens)
    assert abs(model.activation_bytes(batch, seq_len) / sum(kept.values()) - 1) < 0.05
    loss.backward()


def test_ignored_targets_add_nothing_to_the_loss(tokens: torch.Tensor) -> None:
    model = build_model(SMALL)
    targets = tokens.clone()
    targets[:, 5:] = IGNORED
    logits = model(tokens)[:, :5].log_softmax(-1)
    expected = -logits.gather(-1, tokens[:, :5, None]).sum()
    torch.testing.assert_close(next_token(model, tokens, targets), expected)
