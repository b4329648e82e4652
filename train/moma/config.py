"""Settings of the early-fusion stages; run, optim and deepspeed are those of every stage."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mllm.common import plain_yaml
from train.config import DeepSpeedSection, Dtype, OptimSection, RunSection, Section, Weight


class PictureSection(Section):
    """Where pictures and captions come from: miniworld, drawn here, and LLaVA JSON with a caption as the answer."""

    miniworld: int = Field(20_000, ge=0)  # scenes drawn for training
    domains: list[Literal["general", "document", "biomedical"]] = Field(["general"])  # of miniworld, in turn
    captions: list[Path] = Field([])  # LLaVA JSON: first picture, last answer; every 20th picture is for test
    image_root: Path | None = None  # where their pictures lie; null: beside each file
    held_out: int = Field(512, gt=0)  # samples of the test split that are scored

    @model_validator(mode="after")
    def something_to_read(self) -> "PictureSection":
        if not self.miniworld and not self.captions:
            raise ValueError("miniworld is 0 and captions are empty: there is nothing to read")
        if self.miniworld and not self.domains:
            raise ValueError("domains is empty: name general, document or biomedical, or set miniworld to 0")
        return self


class StreamSection(PictureSection):
    """How samples become documents, and documents rows; tokenised once and kept in `cache`."""

    length: int = Field(512, ge=16)  # tokens of a row; documents are packed into it without padding
    rows: int | None = Field(None, gt=0)  # rows to make, samples over and over in new forms; null: each sample once
    # also interleaved, text, image
    forms: dict[str, Weight] = Field({"image_to_text": 1.0, "text_to_image": 1.0})
    # Of image tokens. experts: that of image experts among those of one modality (MoMa), half where either is missing;
    # another share makes other rows, so an upcycled model begins them anew. null: as the forms make it.
    image_share: Annotated[float, Field(gt=0, lt=1)] | Literal["experts"] | None = 0.5
    cache: Path = Path("runs/moma/rows")  # rows of these settings are found again by their digest


class ImageTokenizerSection(Section):
    """The autoencoder; see ImageTokenizer.small."""

    image_size: int = Field(96, gt=0)
    side: int = Field(12, gt=0)  # tokens a side: a picture is side² tokens
    codebook_size: int = Field(512, gt=1)
    width: int = Field(64, gt=0)  # channels, a multiple of 32
    patch: int = Field(4, gt=0)  # pixels a side that the network sees as one
    quantisation_weight: float = Field(0.25, gt=0)  # of commitment beside reconstruction; codes learn the same by any
    revive_every: int = Field(100, ge=0)  # steps after which unused codes move, but in the last third; 0 never
    kept_codes: int | None = Field(None, gt=0)  # at the end one of each group of codes alike; null: all are kept

    @property
    def shape(self) -> dict[str, int]:
        """What ImageTokenizer.small takes."""
        return self.model_dump(exclude={"quantisation_weight", "revive_every", "kept_codes"})

    @model_validator(mode="after")
    def keeps_what_there_is(self) -> "ImageTokenizerSection":
        if self.kept_codes and self.kept_codes > self.codebook_size:
            raise ValueError(f"kept_codes is {self.kept_codes}, but codebook_size only {self.codebook_size}")
        return self


class MomaModelSection(Section):
    """A new model, or what a stage goes on from."""

    preset: str = "4t4i"  # dense, 8x, 1t1i, 2t2i1s …: see MomaConfig.preset
    fields: dict[str, Any] = Field(
        {}
    )  # other fields of MomaConfig: hidden_size, routing, mixture_of_depths, choice_batch …
    # With mixture_of_depths a new model gets more layers, up to what fields.num_hidden_layers would cost without.
    keep_flops: bool = True
    text_tokenizer: str = "miniworld"  # whose words: a folder or hub id
    image_tokenizer: Path | None = None  # folder of a stage image_tokenizer; null with start_from: that model's
    start_from: Path | None = None  # model folder: routers stage, seed to upcycle (1t1i, dense), or a Llama's
    fresh: list[str] = Field([])  # upcycle: groups whose experts start at random, not as copies
    router_noise: float = Field(1.0, ge=0)  # upcycle: of Gumbel noise that tells copies apart, where experts choose
    gradient_checkpointing: bool = False
    dtype: Dtype = "fp32"  # of computation; weights are fp32


class ReportSection(Section):
    """What is made of a finished model, in a process of its own."""

    enabled: bool = True  # false: only the model is written
    batch_size: int = Field(8, gt=0)  # rows scored at once
    pictures: int = Field(12, ge=0)  # drawn from held-out captions, for the grid
    scored: int = Field(12, ge=0)  # drawn and read for the score; at least those of the grid
    guidance: float = Field(1.0, ge=1)  # classifier-free
    temperature: float = Field(1.0, ge=0)  # of drawing; 0 takes the most probable code


class MomaStage(Section):
    """What all four stages have."""

    run: RunSection
    optim: OptimSection = OptimSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def counts_steps(self) -> "MomaStage":
        if self.run.steps is None:
            raise ValueError("this stage counts steps: give run.steps instead of run.epochs")
        return self

    def save(self, path: Path) -> None:
        """Write the settings as resolved."""
        path.write_text(plain_yaml.write(self.model_dump(mode="json")), encoding="utf-8")


class MomaTrainConfig(MomaStage):
    """What the stages that train the model itself have; each is a subclass in its file."""

    unused: ClassVar[tuple[str, ...]] = ()  # names in `model` that the stage would take and ignore

    stage: str
    model: MomaModelSection
    data: StreamSection = StreamSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def ignores_nothing(self) -> "MomaTrainConfig":
        for name in self.unused:
            if getattr(self.model, name) != MomaModelSection.model_fields[name].default:
                raise ValueError(f"stage {self.stage} has no use for model.{name}: leave it out")
        return self


class ContinuedConfig(MomaTrainConfig):
    """A stage that goes on from a model that is there."""

    @model_validator(mode="after")
    def goes_on_from_a_model(self) -> "ContinuedConfig":
        if self.model.start_from is None:
            raise ValueError(f"stage {self.stage} needs model.start_from, the folder model/ of an earlier run")
        return self
