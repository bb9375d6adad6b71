"""What begins and ends a text is what the files of a tokenizer state, in data, generation and export alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
import torch
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.corpora.reading import Piece, TextFile
from cleangpt.corpora.text import encode_group, grouped
from cleangpt.data.bpe import BPETokenizer, train_bpe
from cleangpt.data.tokenizers import Tokenizer, from_json, load_tokenizer
from cleangpt.errors import UserError
from cleangpt.inference.sampling import GREEDY
from cleangpt.inference.text import prompt_tokens, stream
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from tests.scripted import Scripted
from tests.sentence_piece import PREPENDING

BOS, EOS, EOT = "<｜begin｜>", "<｜end｜>", "<｜turn｜>"
TEXT = "the quick brown fox, déjà vu\n"
LEARNED = train_bpe([TEXT * 20], 300)
CPU = torch.device("cpu")


def unusual(before: bool = False, after: bool = False) -> library.Tokenizer:
    """Byte pairs with special tokens that nobody would guess; `<|endoftext|>` is one of them, and ends nothing."""
    peer = library.Tokenizer.from_str(LEARNED.to_json())
    peer.add_special_tokens([BOS, EOS, EOT])
    template = f"{BOS} " * before + "$A" + f" {EOS}" * after
    ids = [(name, peer.token_to_id(name)) for name in (BOS, EOS)]
    peer.post_processor = library.processors.TemplateProcessing(single=template, special_tokens=ids)
    return peer


def folder(path: Path, peer: library.Tokenizer, **files: Any) -> Path:
    """A folder of Hugging Face; `files` are the others by their names without `.json`."""
    peer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


PEER = unusual()
END, TURN, BEGIN = (PEER.token_to_id(name) for name in (EOS, EOT, BOS))
STATED: dict[str, dict[str, Any]] = {
    "by name": {"tokenizer_config": {"eos_token": EOS}},
    "by name in an object": {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": EOS}}},
    "by name in an older file": {"special_tokens_map": {"eos_token": EOS}, "tokenizer_config": {"eos_token": None}},
    "by id": {"config": {"eos_token_id": END}},
    "by id for generation": {"generation_config": {"eos_token_id": END}},
    "several ids": {"config": {"eos_token_id": [END, TURN]}},
    "several ids for generation": {"config": {"eos_token_id": END}, "generation_config": {"eos_token_id": [END, TURN]}},
    "by name and other ids": {"tokenizer_config": {"eos_token": EOS}, "generation_config": {"eos_token_id": [TURN]}},
    "an id of another model": {"tokenizer_config": {"eos_token": EOS}, "config": {"eos_token_id": 50256}},
}


@pytest.mark.parametrize("files", STATED.values(), ids=STATED)
def test_the_end_of_text_is_the_stated_one_and_stays_so(files: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, unusual(), **files))
    expected = {END, TURN} if str(TURN) in json.dumps(files) else {END}
    for one in (tokenizer, from_json(tokenizer.to_json()), load_tokenizer(tmp_path / "tokenizer.json")):
        assert (one.eos_id, one.stop_ids) == (END, expected)
        assert one.decode([*one.encode(TEXT).tolist(), END]) == TEXT


def test_a_token_that_means_text_ends_no_document(tmp_path: Path) -> None:
    """Such as token 2, Llama's end of text, where a configuration keeps that default with another tokenizer."""
    tokenizer = load_tokenizer(
        folder(tmp_path, library.Tokenizer.from_str(LEARNED.to_json()), config={"eos_token_id": 2})
    )
    assert tokenizer.eos_id == LEARNED.eos_id
    assert tokenizer.decode(tokenizer.encode('"')) == '"'


def test_a_token_becomes_special_where_a_file_says_so(tmp_path: Path) -> None:
    content = json.loads(LEARNED.to_json())
    content["model"]["vocab"][EOS] = LEARNED.vocab_size
    path = folder(tmp_path, library.Tokenizer.from_str(json.dumps(content)), tokenizer_config={"eos_token": EOS})
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.special[EOS] == tokenizer.eos_id
    assert tokenizer.eos_id == LEARNED.vocab_size and tokenizer.decode([tokenizer.eos_id]) == ""


def test_merges_have_their_end_of_text_stated_next_to_them(tmp_path: Path) -> None:
    model = json.loads(LEARNED.to_json())["model"]
    vocabulary = {name.replace("endoftext", "fin"): token for name, token in model["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])), encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|fin|>"}), encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_id == LEARNED.eos_id
    facts = {"bos_token": "<|fin|>", "eos_token": "<|fin|>", "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    begun = load_tokenizer(tmp_path)
    assert from_json(begun.to_json()).encode(TEXT).tolist() == begun.encode(TEXT).tolist()
    assert begun.encode(TEXT).tolist() == GPT2Tokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]


@pytest.mark.parametrize("value", ["2", True, [1, "2"], {"a": 1}, 1.5])
def test_an_id_that_is_none_is_one_line(value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: eos_token_id is .*; allowed: a token id, or a list"):
        load_tokenizer(folder(tmp_path, unusual(), config={"eos_token_id": value}))


# What stands before a text -------------------------------------------------------------------------------------------

NAMED = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
BEFORE: dict[str, tuple[library.Tokenizer, dict[str, Any]]] = {
    "nothing": (unusual(), NAMED),
    "what the post-processor puts there": (unusual(before=True), NAMED),
    "not what it puts after": (unusual(before=True, after=True), NAMED),
    "what it puts there, whatever a flag says": (unusual(before=True), NAMED | {"add_bos_token": False}),
    "what it does not put there": (unusual(), NAMED | {"add_bos_token": True}),
    "of Llama's kind": (library.Tokenizer.from_str(PREPENDING), {"bos_token": "<s>", "eos_token": "</s>"}),
}


@pytest.fixture(params=BEFORE)
def stated(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, list[int]]:
    """A tokenizer, and the tokens that transformers gives `TEXT`, without the end of text."""
    peer, config = BEFORE[request.param]
    (tmp_path / "in").mkdir()
    path = folder(tmp_path / "in", peer, tokenizer_config=config)
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    ids = theirs(TEXT)["input_ids"]
    return load_tokenizer(path), ids[:-1] if ids[-1] == theirs.eos_token_id else ids


def test_a_text_begins_as_transformers_begins_it(stated: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, expected = stated
    assert tokenizer.encode(TEXT).tolist() == prompt_tokens(tokenizer, TEXT) == expected
    assert from_json(tokenizer.to_json()).encode(TEXT).tolist() == expected
    begun = prompt_tokens(tokenizer, None)
    assert begun == (expected[:1] if tokenizer.prefix else [tokenizer.eos_id])


def test_every_document_begins_so_and_once(stated: tuple[Tokenizer, list[int]], tmp_path: Path) -> None:
    tokenizer, expected = stated
    pieces = [Piece("the fox\n", False, 1), Piece("the quick\n", True, 2), Piece(TEXT, True, 3)]
    ((_, group),) = grouped([TextFile(tmp_path, 3, lambda: iter(pieces))])
    (chunk,) = encode_group(group, tokenizer)
    documents = [part.tolist() for part in torch.from_numpy(chunk.tokens).split(chunk.lengths.tolist())]
    assert documents[1] == [*expected, tokenizer.eos_id]
    first, second = (tokenizer.encode(piece.text).tolist() for piece in pieces[:2])
    assert documents[0] == [*first, *second[len(tokenizer.prefix) :], tokenizer.eos_id]


def test_an_export_begins_and_ends_texts_as_we_do(stated: tuple[Tokenizer, list[int]], tmp_path: Path) -> None:
    tokenizer, expected = stated
    config = GPTConfig(vocab_size=tokenizer.vocab_size, max_seq_len=8, n_layers=1, n_heads=1, dim=4)
    weights = dict(build_model(config).state_dict())
    export(Checkpoint(tmp_path, config, tokenizer, weights, {}), "hf", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == expected
    assert theirs.eos_token_id == tokenizer.eos_id
    stored = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert [stored["bos_token_id"]] == prompt_tokens(tokenizer, None)
    again = open_checkpoint(f"hf:{tmp_path / 'out'}").tokenizer
    assert (again.prefix, again.eos_id, again.stop_ids) == (tokenizer.prefix, tokenizer.eos_id, tokenizer.stop_ids)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_several_ends_of_text_are_exported(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = folder(tmp_path / "in", unusual(before=True), tokenizer_config=NAMED, config={"eos_token_id": [END, TURN]})
    tokenizer = load_tokenizer(path)
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "max_seq_len": 8,
        "n_layers": 1,
        "n_heads": 1,
        "dim": 4,
    }
    config = GPTConfig(**sizes) if kind == "gpt" else LlamaConfig(**sizes)
    weights = dict(build_model(config).state_dict())
    export(Checkpoint(tmp_path, config, tokenizer, weights, {}), "hf", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))["eos_token_id"] == [END, TURN]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert open_checkpoint(f"hf:{tmp_path / 'out'}").tokenizer.stop_ids == {END, TURN}


class Repeats(Scripted):
    """Says one token and nothing else."""

    def __init__(self, token: int, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.token = token

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full_like(tokens, self.token), self.config.vocab_size or 0).float()


@pytest.mark.parametrize(("token", "generated"), [(END, 0), (TURN, 0), (BEGIN, 5), (7, 5)])
def test_generation_ends_at_each_of_them(token: int, generated: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, unusual(), config={"eos_token_id": [END, TURN]}))
    model = Repeats(token, tokenizer.vocab_size)
    chunks = list(stream(model, tokenizer, "the", CPU, max_new_tokens=5, sampling=GREEDY))
    assert len([chunk for chunk in chunks if chunk.token]) == generated
