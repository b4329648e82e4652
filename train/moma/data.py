"""Pictures with captions, as samples; and the rows of a run, made once, found again by a digest."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from PIL import Image
from rich.progress import track

from data_recipes.miniworld import Split, draw_scene
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.images import open_image
from mllm.data.sources import Source
from mllm.moma.config import MomaConfig
from mllm.moma.processor import MomaProcessor
from mllm.moma.stream import FORMS, PackedRows, Sample, documents, write_rows
from mllm.routing import MODALITIES, ExpertLayout
from train.moma.config import PictureSection, StreamSection

HELD_OUT = {0: "test", 10: "val"}  # of every 20 pictures of a caption file; the others are trained on
PERIOD = 20
PICTURES_AT_ONCE = 256

Captioned = tuple[Image.Image, str]


# -- pictures ----------------------------------------------------------------------------------------------------------


def captioned(section: PictureSection, split: Split) -> Iterator[Captioned]:
    """Pictures with what is said of them: miniworld's, then those of files, as `caption_files` has them."""
    scenes = section.miniworld if split == "train" else min(section.miniworld, section.held_out)
    for k in range(scenes):
        turn, domain = divmod(k, len(section.domains))
        scene, rng = draw_scene(section.domains[domain], split, turn)
        yield scene.paint(rng), scene.caption
    for row in islice(caption_files(section, split), None if split == "train" else section.held_out):
        yield open_image(row.images[0], where=row.where), row.turns[-1].text


def caption_files(section: PictureSection, split: Split) -> Iterator[Conversation]:
    """Rows with a picture. Pictures are split, in the order they first come, so that none is in two splits.

    Raises UserError for a file that cannot be read, and one that holds no row with a picture.
    """
    for path in section.captions:
        numbers: dict[Path, int] = {}
        for row in Source(path, image_root=section.image_root):
            if row.images:
                number = numbers.setdefault(row.images[0], len(numbers))
                if HELD_OUT.get(number % PERIOD, "train") == split:
                    yield row
        if not numbers:
            raise UserError(f"data.captions: {path} has no row with a picture. Give LLaVA JSON with `image` keys.")


def samples(section: PictureSection, split: Split, processor: MomaProcessor) -> Iterator[Sample]:
    """The same, tokenised."""
    rows = captioned(section, split)
    while chunk := list(islice(rows, PICTURES_AT_ONCE)):
        codes_NP = processor.image_tokenizer.encode([picture for picture, _ in chunk])
        for codes_P, (_, caption) in zip(codes_NP, chunk, strict=True):
            yield Sample(codes_P, processor.text_ids(caption))


# -- rows --------------------------------------------------------------------------------------------------------------


def training_rows(section: StreamSection, processor: MomaProcessor) -> PackedRows:
    """The rows of a run, written unless they are there. One process at a time."""
    folder = section.cache / data_digest(section, processor)
    if not (folder / "made.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        stream = _training_documents(section, processor)
        made = write_rows(stream, folder, "train", length=section.length, rows=section.rows)
        if not made:
            raise UserError(f"data: all documents together fill no row of length {section.length}; lower data.length.")
        (folder / "made.json").write_text(json.dumps({"rows": made} | section.model_dump(mode="json"), indent=1))
    return PackedRows.read(folder, "train")


def _training_documents(section: StreamSection, processor: MomaProcessor) -> Iterator[list[int]]:
    """Each sample once, or over and over where the number of rows is given, in forms drawn anew each time."""
    known = None if section.captions else section.miniworld
    kept = list(track(samples(section, "train", processor), "pictures to tokens", known, transient=True))
    if not kept:
        raise UserError(
            f"data: no sample is left to train on: of every {PERIOD} pictures of a caption file, the first is for test "
            "and the eleventh for validation. Give more pictures, or data.miniworld."
        )
    for seed in count() if section.rows else (0,):
        yield from documents(kept, processor, weights=section.forms, image_share=section.image_share, seed=seed)


def held_out_documents(section: StreamSection, processor: MomaProcessor, split: Split = "test") -> list[list[int]]:
    """Every held-out sample as a document of its own in both orders, so that all four directions are scored on each."""
    kept = list(samples(section, split, processor))
    return [
        document
        for form in ("image_to_text", "text_to_image")
        for document in documents(kept, processor, weights={form: 1}, image_share=None, seed=0)
    ]


def data_digest(section: StreamSection, processor: MomaProcessor) -> str:
    """A short name of all that rows follow from: settings, vocabulary, both tokenizers, the caption files' bytes."""
    settings = section.model_dump(mode="json", exclude={"cache", "held_out"})
    settings |= {"captions": [], "image_root": None}  # where they lie does not matter; what they say is added below
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    name.update(json.dumps(processor.tokenizer.get_vocab(), sort_keys=True).encode())
    name.update(json.dumps([processor.config_fields, processor.image_tokenizer.num_tokens], sort_keys=True).encode())
    for key, weight in processor.image_tokenizer.model.state_dict().items():
        name.update(key.encode() + weight.float().cpu().numpy().tobytes())
    for path in section.captions:
        name.update(f"{HELD_OUT} of {PERIOD}".encode() + Path(path).read_bytes())
    return name.hexdigest()[:16]


def contents(section: StreamSection, processor: MomaProcessor) -> str:
    """The digest, and a line about each file of captions, by which a change can be named."""
    files = [f"{Path(path).name}: content {sha256(path)}" for path in section.captions]
    return "\n".join([data_digest(section, processor), *files])


def sha256(path: str | Path) -> str:
    """Twelve hexadecimal digits of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def as_experts(section: StreamSection, layout: ExpertLayout) -> StreamSection:
    """The settings with image_share as a number, where it goes by the model's experts."""
    if section.image_share != "experts":
        return section
    text, image = (layout.groups.get(modality, 0) for modality in MODALITIES)
    return section.model_copy(update={"image_share": image / (text + image) if text and image else 0.5})


def check_length(section: StreamSection, config: MomaConfig, processor: MomaProcessor) -> None:
    """Raises UserError where a picture and a word of it are too long for a row, or for the model's positions."""
    if not any(weight > 0 for form, weight in section.forms.items() if form not in ("text", "image")):
        return
    least = len(processor.open_ids([])) + processor.image_tokenizer.num_tokens + 3  # two markers and a word
    if min(section.length, config.max_position_embeddings) < least:
        raise UserError(
            f"A picture and a word are {least} tokens: raise data.length ({section.length}) and the model's "
            f"max_position_embeddings ({config.max_position_embeddings}) to more than that."
        )


def check_data(section: PictureSection) -> None:
    """What can be said of the settings in a second. Raises UserError naming the key."""
    if isinstance(section, StreamSection):
        if unknown := [form for form in section.forms if form not in FORMS]:
            raise UserError(f"data.forms: {unknown[0]!r} is not a form of documents; choose of {', '.join(FORMS)}.")
        if not any(weight > 0 for weight in section.forms.values()):
            raise UserError("data.forms: every weight is zero; give one form a positive weight.")
    for path in section.captions:
        if not path.is_file():
            raise UserError(f"data.captions: no such file {path}.")
