"""Your own pictures with text: conversations with pictures in their messages, or pictures with captions.

JSON lines, JSON or Parquet, as LLaVA, TRL and Hugging Face's image folders have them:

    {"messages": [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "Two."}]}
    {"file_name": "a.png", "text": "Two red circles."}

Paths are relative to the file that names them. A part without a path stands for the next of the entry's `images`, as in
TRL's data; Parquet may have pictures themselves in the place of paths, as the Hub's datasets do. A caption may also be
a file of its own: a.txt beside a.png. The targets are the assistant's answers, or the captions.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import write_dataset
from cleangpt.corpora.conversations import (
    CUT,
    NO_ANSWER,
    SPECIAL,
    Chat,
    choose_template,
    known_tokenizer,
    without_special,
)
from cleangpt.corpora.hub_text import HubDataset, Shards
from cleangpt.corpora.packing import pack
from cleangpt.corpora.reading import (
    FORMS,
    Piece,
    TextFile,
    find_files,
    is_plain,
    read_entries,
    read_text,
    split_documents,
    text_in,
)
from cleangpt.corpora.text import END_CHARACTER, characters, stamps, text_files
from cleangpt.data.chat_template import ASSISTANT, ChatTemplate, answer_mask, encode_chat, special_tokens
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.images import IMAGE_CHARACTER, IMAGE_TOKEN, IMAGES, expanded, reads_parts, written_image_token
from cleangpt.data.pictures import PictureForm, Resample, Resize, decode_picture, read_picture
from cleangpt.data.records import PlacedRecords, Records
from cleangpt.data.tokenizers import CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from cleangpt.data.writer import Chunk, Groups
from cleangpt.errors import UserError
from cleangpt.validation import Bounds, File, Pattern

GROUP = 256
"""Conversations whose pictures are decoded and written together."""
READERS = 4
"""Threads that decode pictures."""
Pixels = Annotated[int, Bounds(1, 4096)]


class Embedded(NamedTuple):
    """A picture in a file of others."""

    content: bytes
    location: str
    """For messages."""


Picture = Path | Embedded
Parts = list[str | Picture]
"""The content of a message: texts and pictures."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of pictures that a file with a caption may stand beside."""


@dataclass(frozen=True)
class PicturePiece(Piece):
    """A conversation, with its pictures."""

    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pictures(Chat):
    """Your own pictures with conversations or captions. Needs jinja2, Pillow and, for bpe, tokenizers.

    Pictures are decoded and resized when the dataset is prepared. Conversations are packed into rows; one longer than a
    row is truncated, or skipped if that would leave no answer, or cut a picture off.
    """

    files: tuple[File, ...] = ()
    """Files, globs or folders: of lists in .jsonl, .json or .parquet, or of .txt captions beside pictures."""
    hub_dataset: Annotated[str, Pattern(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", "OWNER/NAME or OWNER/NAME/FOLDER")] | None = None
    """A dataset on the Hub, whose Parquet files are downloaded into data/downloads and read in place of files."""
    tokenizer: Literal["char", "byte", "bpe"] = "bpe"
    """bpe: byte-pair encoding trained on the text; char: one token per character."""
    images_field: str = "images"
    """For messages: field or column with the pictures that parts without a path stand for, in their order; may be
    absent."""
    image_field: str = "file_name"
    """For captions: field with the path of a picture; ignored where there is a list of messages."""
    caption_field: str = "text"
    """For captions: field with the text."""
    height: Pixels = 64
    """Of the pictures in pixels, as the model reads them."""
    width: Pixels = 64
    """Of the pictures in pixels."""
    channels: Literal[1, 3] = 3
    """1: grey; 3: red, green and blue."""
    resize: Resize = "stretch"
    """How a picture gets that size: stretch: each side to its own; crop: the shorter side, then the middle is cut out;
    as model.vision.resize."""
    resample: Resample = "bicubic"
    """Interpolation of Pillow; as model.vision.resample."""
    image_tokens: Annotated[int, Bounds(1, 65536)] = 16
    """Tokens that a picture stands at: its patches, as the model's encoder counts them."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        if self.tokenizer == "byte" and self.tokenizer_file is None:
            raise UserError(
                "corpus.tokenizer is 'byte'; allowed with pictures: bpe or char, which have a token for them"
            )
        if bool(self.files) == (self.hub_dataset is not None):
            raise UserError(f"corpus.files is {self.files}; allowed: files or corpus.hub_dataset, one of them")
        if self.image_tokens >= self.pack:
            raise UserError(
                f"corpus.pack is {self.pack}; allowed: more than corpus.image_tokens, which is {self.image_tokens}"
            )

    def choose_tokenizer(self, files: list[TextFile], console: Console) -> Tokenizer:
        """The tokenizer of `tokenizer_file`, or one of the kind `tokenizer` trained on the files, with a token for
        images.

        Raises:
            UserError: there is no text to train on, or the given tokenizer has no such token.
        """
        if self.tokenizer_file is not None:
            given = load_tokenizer(self.tokenizer_file)
            written_image_token(given)
            return given
        console.print(f"learning the {self.tokenizer} tokenizer from the text", markup=False)
        if self.tokenizer == "bpe":
            texts = (piece.text.replace(IMAGE_TOKEN, "") for file in files for piece in file.pieces())
            return train_bpe(texts, self.vocab_size, [IMAGE_TOKEN])
        found = characters(files).replace(IMAGE_CHARACTER, "")
        return CharTokenizer(END_CHARACTER + IMAGE_CHARACTER + found, END_CHARACTER)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        given, known = known_tokenizer(self)
        template = choose_template(self.chat_template, self.tokenizer_file, known)
        files, source = self._files(folder, partial(self._pieces, template=template, tokenizer=known))
        tokenizer = given or self.choose_tokenizer(without_special(files, known), console)
        written_image_token(tokenizer)
        shape = (self.height, self.width, self.channels)
        return write_dataset(
            self, folder, tokenizer, partial(self._groups, files, tokenizer), sum(file.bytes for file in files),
            console, source=source, row_length=self.row_length, chat_template=template,
            records={IMAGES: Records(dtype="uint8", shape=shape, tokens=self.image_tokens)},
        )  # fmt: skip

    def _files(
        self, folder: Path, pieces: Callable[[Path, str], Iterator[Piece]]
    ) -> tuple[list[TextFile], dict[str, Any]]:
        """What is read, and its description for dataset.json."""
        if self.hub_dataset is not None:
            owner, name, *inside = self.hub_dataset.split("/")
            shards = Shards(HubDataset(f"{owner}/{name}", "/".join(inside)), folder, keep=True)
            return shards.files(pieces), shards.source()
        found = text_files(find_files(self.files), pieces)
        lists = [file for file in found if not is_plain(file.path)]
        captions = [file for file in found if file.path.suffix == ".txt" and _picture_beside(file.path)]
        if not lists and not captions:
            raise UserError(
                f"{', '.join(self.files)} has no list of pictures; allowed: {FORMS}, which names them, or .txt beside "
                "pictures"
            )
        sizes = Counter[Path]()
        for file in captions:
            sizes[file.path.parent] += file.bytes
        together = [TextFile(parent, size, partial(pieces, parent, parent.name)) for parent, size in sizes.items()]
        return lists + together, {"files": stamps(found)}

    def _entries(self, path: Path) -> Iterator[tuple[Any, str, int]]:
        if path.is_dir():
            return _captions(path, self.image_field, self.caption_field)
        return read_entries(path, (), [self.messages_field, self.images_field, self.image_field, self.caption_field])

    def _pieces(self, path: Path, name: str, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Piece]:
        folder = path if path.is_dir() else path.parent
        special = {**special_tokens(tokenizer), IMAGE_TOKEN: -1}
        mark = IMAGE_CHARACTER if self.tokenizer == "char" and self.tokenizer_file is None else IMAGE_TOKEN
        rendered = (self._piece(entry, location, read, folder, template, special, mark)
                    for entry, location, read in self._entries(path))  # fmt: skip
        return split_documents(rendered, name, self.val_fraction)

    def _piece(
        self, entry: Any, location: str, read: int, folder: Path, template: ChatTemplate, special: dict[str, int],
        mark: str,
    ) -> PicturePiece:  # fmt: skip
        """A conversation as text, with a mark for each picture."""
        if not isinstance(entry, dict) or entry.get(self.messages_field) is not None:
            parts = self._listed_parts(entry, location)
        else:
            picture = _picture(entry.get(self.image_field), location)
            if picture is None:
                named = text_in(entry, self.image_field, location, "corpus.image_field")
                raise UserError(f"{location}: {self.image_field!r} is {named!r}; allowed: the path of a local file")
            caption = text_in(entry, self.caption_field, location, "corpus.caption_field")
            parts = [[picture], [caption]]
            entry = {self.messages_field: [{self.role_field: role} for role in ("user", ASSISTANT)]}
        shown = [part for message in parts for part in message if not isinstance(part, str)]
        pictures = tuple(folder / picture if isinstance(picture, Path) else picture for picture in shown)
        fields = (self.messages_field, self.content_field)
        plain, marked = (self._messages(_with_texts(entry, *fields, parts, text), location) for text in ("", mark))
        if all(message["role"] != ASSISTANT for message in plain):
            return PicturePiece("", True, read, skip_reason=NO_ANSWER)
        messages = _as_parts(marked, mark) if reads_parts(template) else marked
        try:
            if template.render_guarded(plain, special) is not None:
                return PicturePiece("", True, read, skip_reason=SPECIAL)
            text, answers = template.render_answers(messages, special)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
        if text.count(mark) != len(pictures):
            raise UserError(f"{location}: the chat template writes {text.count(mark)} of {len(pictures)} pictures")
        return PicturePiece(text, True, read, answers=tuple(answers), pictures=pictures)

    def _listed_parts(self, entry: Any, location: str) -> list[Parts]:
        """The contents of the messages of an entry."""
        listed = entry.get(self.messages_field) if isinstance(entry, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(message, dict) for message in listed):
            raise UserError(f"{location}: no list of messages in a field {self.messages_field!r}")
        given = entry.get(self.images_field) or []
        images = iter(given if isinstance(given, list) else [given])
        found = [_parts(message, self.content_field, location, images) for message in listed]
        if next(images, None) is not None:
            raise UserError(f"{location}: {self.images_field!r} has more pictures than the messages have places for")
        return found

    def _groups(self, files: list[TextFile], tokenizer: Tokenizer, start: int) -> Groups:
        before, number = 0, 0
        for file in files:
            pieces = iter(file.pieces())
            while group := list(itertools.islice(pieces, GROUP)):
                number += 1
                if number > start:
                    yield (
                        before + group[-1].read,
                        [
                            self._chunk(split, [piece for piece in group if piece.split == split], tokenizer)
                            for split in sorted({piece.split for piece in group})
                        ],
                    )
            before += file.bytes

    def _chunk(self, split: str, pieces: list[Any], tokenizer: Tokenizer) -> Chunk:
        """The conversations of one split in rows, with their pictures."""
        counts = Counter({"conversations": len(pieces), "pictures": 0, SPECIAL: 0, NO_ANSWER: 0, CUT: 0})
        counts.update(piece.skip_reason for piece in pieces if piece.skip_reason)
        pieces = [piece for piece in pieces if not piece.skip_reason]
        documents, masks, numbers = (list[NDArray[Any]]() for _ in range(3))
        names, text_bytes = list[Picture](), 0
        for piece, (ids, places) in zip(pieces, encode_chat(tokenizer, [piece.text for piece in pieces]), strict=True):
            mask = answer_mask(places, list(piece.answers))
            if tokenizer.eos_id is not None and ids[-1:].tolist() != [tokenizer.eos_id]:
                ids, mask = np.append(ids, tokenizer.eos_id), np.append(mask, 0)
            image = written_image_token(tokenizer)
            mask = np.where(ids == image, 0, mask).repeat(np.where(ids == image, self.image_tokens, 1))
            ids, ends = expanded(ids, image, self.image_tokens)
            if not mask[1 : self.row_length].any() or ends.max(initial=0) > self.row_length:
                counts[NO_ANSWER] += 1
                continue
            number = np.zeros(len(ids), np.int64)
            number[ends - 1] = np.arange(len(names), len(names) + len(ends)) + 1
            names += piece.pictures
            counts[CUT] += len(ids) > self.row_length
            for parts, values in ((documents, ids), (masks, mask), (numbers, number)):
                parts.append(values[: self.row_length])
            text_bytes += len(piece.text.encode("utf-8"))
        tokens, mask = pack(documents, self.row_length, masks)
        flat = pack(numbers, self.row_length)[0].reshape(-1)
        ends = np.flatnonzero(flat)
        counts["pictures"] = len(ends)
        images = self._read([names[number - 1] for number in flat[ends].tolist()])
        return Chunk(
            split, tokens.reshape(-1), np.full(len(tokens), self.row_length, np.int64), text_bytes, mask.reshape(-1),
            counts, records={IMAGES: PlacedRecords(images, ends + 1)},
        )  # fmt: skip

    def _read(self, names: list[Picture]) -> NDArray[np.uint8]:
        """The pictures decoded; one that comes several times is decoded once."""
        distinct = list(dict.fromkeys(names))
        with ThreadPoolExecutor(READERS) as readers:
            form = PictureForm(self.height, self.width, self.channels, self.resize, self.resample)
            read = partial(_decoded, form=form)
            found = dict(zip(distinct, readers.map(read, distinct), strict=True))
        shape = (self.height, self.width, self.channels)
        return np.stack([found[name] for name in names]) if names else np.zeros((0, *shape), np.uint8)


def _decoded(picture: Picture, form: PictureForm) -> NDArray[np.uint8]:
    if isinstance(picture, Embedded):
        return decode_picture(picture.content, picture.location, form)
    return read_picture(picture, form)


def _picture_beside(caption: Path) -> Path | None:
    """The picture whose caption a file is by its name, if there is one."""
    beside = (caption.with_suffix(suffix) for small in SUFFIXES for suffix in (small, small.upper()))
    return next((path for path in beside if path.is_file()), None)


def _captions(folder: Path, image_field: str, caption_field: str) -> Iterator[tuple[Any, str, int]]:
    """The captions in a folder, as lists have them."""
    read = 0
    for path in sorted(folder.glob("*.txt")):
        if (picture := _picture_beside(path)) is not None:
            text = "".join(piece.text for piece in read_text(path)).strip()
            read += path.stat().st_size
            yield {image_field: picture.name, caption_field: text}, str(path), read


def _picture(value: Any, location: str) -> Picture | None:
    """A picture as lists have it: a path, or an object with its bytes; None: it is neither."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return Embedded(value["bytes"], f"{location}: the picture")
    path = value.get("path") if isinstance(value, dict) else value
    return Path(path) if isinstance(path, str) and path and not re.match(r"[a-z]+:", path) else None


def _parts(message: Any, content_field: str, location: str, images: Iterator[Any]) -> Parts:
    """The content of a message, with the next of `images` where a part has no path.

    Raises:
        UserError: a part is neither text nor an image with a path.
    """
    content = message.get(content_field) if isinstance(message, dict) else None
    found: Parts = []
    for part in content if isinstance(content, list) else [content or ""]:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        if part.get("type") == "image":
            named = [part[key] for key in ("path", "image", "url") if part.get(key) is not None]
            picture = _picture((named or [next(images, None)])[0], location)
        if part.get("type") == "image" and picture is not None:
            found.append(picture)
        elif part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            found.append(part["text"])
        else:
            raise UserError(
                f"{location}: a part of a message is {str(part)[:100]}; allowed: {{'type': 'text', 'text': …}} and "
                "{'type': 'image', 'path': …} with a local file, or one of the entry's images"
            )
    return found


def _with_texts(entry: Any, messages_field: str, content_field: str, parts: list[Parts], mark: str) -> dict[str, Any]:
    """An entry whose messages have texts as contents, with a mark for each picture."""
    texts = ["".join(part if isinstance(part, str) else mark for part in message) for message in parts]
    listed = entry[messages_field]
    messages = [{**message, content_field: text} for message, text in zip(listed, texts, strict=True)]
    return {**entry, messages_field: messages}


def _as_parts(messages: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, as chat templates of models that read images expect them."""

    def parts(text: str) -> list[dict[str, str]]:
        pieces = [piece for piece in re.split(f"({re.escape(mark)})", text) if piece]
        return [{"type": "image"} if piece == mark else {"type": "text", "text": piece} for piece in pieces]

    return [{**message, "content": parts(message["content"] or "")} for message in messages]
