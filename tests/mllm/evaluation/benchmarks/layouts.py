"""Five rows of every benchmark in the layout that its publisher ships, made here: names, questions and pictures are
invented, only keys and places are theirs. `@layout` gives each by the benchmark's name.
"""

import base64
import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.tiny import tiny_image

COLOURS = ["red", "blue", "green", "white", "black"]
LAYOUTS: dict[str, Callable[[Path], None]] = {}


def layout(*names: str):
    def keep(make):
        LAYOUTS.update(dict.fromkeys(names, make))
        return make

    return keep


def put(path: Path, content: object) -> None:
    """JSON, or one record a line for .jsonl; or a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl":
        put(path, "".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def lines(path: Path, rows: list[dict]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def show(path: Path, colour: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny_image(colour).save(path)
    return path.name


def encoded(colour: str) -> bytes:
    data = io.BytesIO()
    tiny_image(colour).save(data, "PNG")
    return data.getvalue()


def table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def columns(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def ten(answer: str) -> list[dict]:
    """VQA's ten people, one of whom sees it otherwise."""
    said = [answer] * 9 + ["something else"]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": number} for number, text in enumerate(said, 1)]


@layout("pope")
def pope(folder):
    for kind in ("random", "popular", "adversarial"):
        rows = []
        for number, colour in enumerate(COLOURS, 1):
            name = show(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", colour)
            label = "yes" if number % 2 else "no"
            rows.append({"question_id": number, "image": name, "text": f"Is there a {colour} thing?", "label": label})
        lines(folder / f"coco_pope_{kind}.json", rows)


@layout("mme")
def mme(folder):
    for number, colour in enumerate(COLOURS[:3]):
        show(folder / "existence" / f"{number:06d}.jpg", colour)
        put(folder / "existence" / f"{number:06d}.txt", f"Is this {colour}?\tYes\nIs this violet?\tNo\n")
    for number, colour in enumerate(COLOURS[:2]):
        show(folder / "artwork" / "images" / f"{number}.png", colour)
        put(
            folder / "artwork" / "questions_answers_YN" / f"{number}.txt",
            "Is it of a square? Please answer yes or no.\tYes\nIs it of a sphere? Please answer yes or no.\tNo",
        )


@layout("scienceqa")
def scienceqa(folder):
    problems = {}
    for number, colour in enumerate(COLOURS, 1):
        has_picture = number % 2
        if has_picture:
            show(folder / "test" / str(number) / "image.png", colour)
        problems[str(number)] = {
            "question": "Which colour is it?",
            "choices": COLOURS,
            "answer": number - 1,
            "hint": "" if has_picture else f"The thing is {colour}.",
            "image": "image.png" if has_picture else None,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "split": "test",
        }
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


@layout("textvqa")
def textvqa(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        show(folder / "train_images" / f"{number:016x}.jpg", colour)
        rows.append(
            {
                "question": "what is written?",
                "image_id": f"{number:016x}",
                "image_classes": ["Sign"],
                "question_id": 34602 + number,
                "question_tokens": ["what", "is", "written"],
                "answers": [colour] * 9 + ["nothing"],
                "set_name": "val",
            }
        )
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": rows})


@layout("vqav2")
def vqav2(folder, prefix="v2_"):
    questions, annotations = [], []
    for number, colour in enumerate(COLOURS, 1):
        show(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", colour)
        key = number * 1000
        questions.append({"image_id": number, "question": "What color is it?", "question_id": key})
        annotations.append(
            {
                "question_type": "what color is",
                "multiple_choice_answer": colour,
                "answers": ten(colour),
                "image_id": number,
                "answer_type": "other",
                "question_id": key,
            }
        )
    put(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    put(folder / f"{prefix}mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations[::-1]})


@layout("okvqa")
def okvqa(folder):
    vqav2(folder, prefix="")


@layout("vizwiz")
def vizwiz(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "val" / f"VizWiz_val_{number:08d}.jpg", colour)
        kinds = {"answer_type": "other", "answerable": 1}
        rows.append({"image": name, "question": "What colour is this?", "answers": ten(colour)} | kinds)
    put(folder / "val.json", rows)


@layout("gqa")
def gqa(folder):
    rows = {}
    for number, colour in enumerate(COLOURS):
        show(folder / "images" / f"n{number}.jpg", colour)
        kinds = {"structural": "query", "semantic": "attr", "detailed": "attr"}
        rows[f"20{number}"] = {
            "question": "What color is the square?",
            "imageId": f"n{number}",
            "answer": colour,
            "fullAnswer": f"The square is {colour}.",
            "types": kinds,
            "isBalanced": True,
        }
    put(folder / "testdev_balanced_questions.json", rows)


@layout("chartqa")
def chartqa(folder):
    for kind, count in (("human", 3), ("augmented", 2)):
        rows = []
        for number in range(count):
            name = show(folder / "test" / "png" / f"{kind}{number}.png", COLOURS[number])
            rows.append({"imgname": name, "query": "How high is the first bar?", "label": str(12.5 + number)})
        put(folder / "test" / f"test_{kind}.json", rows)


@layout("docvqa")
def docvqa(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        show(folder / "documents" / f"page{number}_1.png", colour)
        rows.append(
            {
                "questionId": 49150 + number,
                "question": "What is the date?",
                "question_types": ["handwritten"],
                "image": f"documents/page{number}_1.png",
                "docId": number,
                "ucsf_document_id": f"page{number}",
                "ucsf_document_page_no": "1",
                "answers": [f"July {number + 1}", f"July {number + 1}, 1986"],
                "data_split": "val",
            }
        )
    put(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": rows})


@layout("infovqa")
def infovqa(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "infographicsvqa_images" / f"{10000 + number}.jpeg", colour)
        rows.append(
            {
                "questionId": 98313 + number,
                "question": "How many of ten agree?",
                "image_local_name": name,
                "image_url": "",
                "answers": [str(number + 20)],
                "answer_type": ["single span"],
                "data_split": "val",
            }
        )
    put(folder / "infographicsVQA_val_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": rows})


@layout("ai2d")
def ai2d(folder):
    for number, colour in enumerate(COLOURS):
        show(folder / "ai2d" / "images" / f"{number}.png", colour)
        about = {"abcLabel": number % 2 == 0, "answerTexts": COLOURS[:4], "correctAnswer": number % 4}
        content = {
            "questions": {"Which colour?": about | {"questionId": f"{number}.png-0"}},
            "imageName": f"{number}.png",
        }
        put(folder / "ai2d" / "questions" / f"{number}.png.json", content)
    put(folder / "ai2d_test_ids.csv", "0\n1\n2\n3\n4\n")


@layout("mmbench", "mmbench_circular")
def mmbench(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        image = base64.b64encode(encoded(colour)).decode() if number else base64.b64encode(encoded("red")).decode()
        options = {"A": COLOURS[0], "B": COLOURS[1], "C": COLOURS[2] if number else "", "D": ""}
        rows.append(
            {
                "index": 241 + number,
                "question": "Which colour is it?",
                "hint": "Look closely." if number == 1 else "",
                **options,
                "answer": "AB"[number % 2],
                "category": "attribute_recognition",
                "image": "241" if number == 4 else image,
                "source": "made here",
                "l2-category": "finegrained_perception (instance-level)",
                "comment": "",
                "split": "dev",
            }
        )
    table(folder / "mmbench_dev_20230712.tsv", rows)


@layout("mmmu")
def mmmu(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        is_open = number == 4
        pictures = {f"image_{n}": None for n in range(1, 8)}
        pictures["image_1"] = {"bytes": encoded(colour), "path": f"{number}.png"}
        pictures["image_2"] = {"bytes": encoded("pink"), "path": "x.png"} if number == 3 else None
        rows.append(
            {
                "id": f"validation_Art_{number + 1}",
                "question": "Which colour has <image 1>?" if number else "Which colour?",
                "options": "[]" if is_open else "['red', 'blue <image 2>', 'green', \"painter's white\"]",
                "explanation": "",
                **pictures,
                "img_type": "['Paintings']",
                "answer": "black" if is_open else "ABCD"[number],
                "topic_difficulty": "Easy",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": "Drawing",
            }
        )
    columns(folder / "Art" / "validation-00000-of-00001.parquet", rows)


@layout("seed")
def seed(folder):
    rows = []
    for number, colour in enumerate([*COLOURS, "film"]):
        if colour != "film":
            show(folder / "SEED-Bench-image" / f"{number}.jpg", colour)
        rows.append(
            {
                "answer": "ABCD"[number % 4],
                **{f"choice_{letter}": COLOURS[place] for place, letter in enumerate("abcd")},
                "data_id": f"{number}.jpg",
                "data_type": "video" if colour == "film" else "image",
                "question": "Which colour?",
                "question_id": str(number),
                "question_type_id": 1,
            }
        )
    put(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene Understanding": 1}})


@layout("vqa_rad")
def vqa_rad(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "VQA_RAD Image Folder" / f"synpic{number}.jpg", colour)
        closed = number % 2
        rows.append(
            {
                "qid": number,
                "phrase_type": "test_freeform" if number % 3 else "test_para",
                "qid_linked_id": f"03f451ca-{number}",
                "image_case_url": "",
                "image_name": name,
                "image_organ": "CHEST",
                "evaluation": "not evaluated",
                "question": "Is it enlarged?" if closed else "Where is the mass?",
                "question_rephrase": "NULL",
                "question_relation": "NULL",
                "question_frame": "NULL",
                "question_type": "SIZE",
                "answer": "Yes" if closed else "left upper lobe",
                "answer_type": "CLOSED " if closed else "OPEN",
            }
        )
    rows.append(rows[0] | {"qid": 9, "phrase_type": "freeform"})
    put(folder / "VQA_RAD Dataset Public.json", rows)


@layout("slake", "slake_zh")
def slake(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        show(folder / "imgs" / f"xmlab{number}" / "source.jpg", colour)
        shared = {"img_id": number, "img_name": f"xmlab{number}/source.jpg", "location": "Lung", "modality": "X-Ray"}
        shared |= {"answer_type": "OPEN", "base_type": "vqa", "content_type": "Organ", "triple": ["vhead", "_", "_"]}
        english = {"question": "Which organ is it?", "q_lang": "en", "answer": "Lung", "qid": 11000 + number}
        chinese = {"question": "这是什么器官？", "q_lang": "zh", "answer": "肺", "qid": 21000 + number}
        rows += [shared | english, shared | chinese]
    put(folder / "test.json", rows)


@layout("pathvqa")
def pathvqa(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        show(folder / "images" / "test" / f"test_{number:04d}.jpg", colour)
        closed = number % 2
        question = "is there necrosis?" if closed else "what is shown?"
        rows.append(
            {"image": f"test_{number:04d}", "question": question, "answer": "yes" if closed else "fibrous tissue"}
        )
    path = folder / "qas" / "test" / "test_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(rows))


@layout("pmc_vqa")
def pmc_vqa(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "images" / f"PMC{number}_Fig1_4.jpg", colour)
        choices = {f"Choice {letter}": f" {letter}:{COLOURS[place]} " for place, letter in enumerate("ABCD")}
        letter = "ABCD"[number % 4]
        rows.append(
            {"Figure_path": name, "Question": " Which colour? ", "Answer": "x", **choices, "Answer_label": letter}
        )
    table(folder / "test.csv", rows)


@layout("vsr")
def vsr(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "images" / f"{number:012d}.jpg", colour)
        about = {"image_link": "", "relation": "under", "annotator_id": 1, "vote_true_validator_id": []}
        rows.append({"image": name, "caption": "The square is under the circle.", "label": number % 2} | about)
    put(folder / "test.jsonl", rows)


@layout("nlvr2")
def nlvr2(folder):
    rows = []
    for number, colour in enumerate(COLOURS):
        for side in (0, 1):
            show(folder / "test1" / f"test1-{number}-0-img{side}.png", colour)
        about = {"synset": "square", "query": f"squares{number}", "label": "True" if number % 2 else "False"}
        rows.append({"sentence": "Both are square.", "identifier": f"test1-{number}-0-1"} | about)
    lines(folder / "test1.json", rows)


@layout("ocrvqa")
def ocrvqa(folder):
    books = {}
    for number, colour in enumerate([*COLOURS, "grey"]):
        key = f"07{number:08d}"
        show(folder / "images" / f"{key}.jpg", colour)
        books[key] = {
            "imageURL": f"http://images.example/{key}.{'gif' if number == 2 else 'jpg'}",
            "questions": ["Who wrote this book?", "Is it a comic?"],
            "answers": [f"Author {number}", "No"],
            "title": "A book",
            "authorName": f"Author {number}",
            "genre": "Novels",
            "split": 1 if colour == "grey" else 3,
        }
    put(folder / "dataset.json", books)


def due(folder, annotations):
    rows = []
    for number, colour in enumerate(COLOURS):
        show(folder / "png" / f"doc{number}.png", colour)
        values = [
            {"key": key, "values": [{"value": value, "value_variants": [value]} for value in values]}
            for key, values in annotations(number).items()
        ]
        rows.append({"name": f"doc{number}", "language": "en", "split": "test", "annotations": values})
    lines(folder / "test" / "document.jsonl", rows)


@layout("wtq")
def wtq(folder):
    due(folder, lambda number: {"which team won?": [f"team {number}"], "which two lost?": ["b", "c"]})


@layout("tabfact")
def tabfact(folder):
    due(folder, lambda number: {"the first team won": [str(number % 2)]})


@layout("deepform")
def deepform(folder):
    due(folder, lambda number: {"gross_amount": ["$1,200.00", "1200"], "advertiser": [f"Committee {number}"]})


def karpathy(path, filepath):
    images = []
    for number, colour in enumerate(COLOURS):
        name = show(path.parent / (filepath or "flickr30k-images") / f"{number:012d}.jpg", colour)
        sentences = [
            {"raw": f"A {colour} square.", "tokens": ["a", colour, "square"]},
            {"raw": f"one square, {colour}"},
        ]
        image = {"filename": name, "imgid": number, "split": "test", "sentences": sentences}
        images.append(image | ({"filepath": filepath, "cocoid": 391895 + number} if filepath else {}))
    images.append(images[0] | {"split": "restval", "imgid": 99})
    put(path, {"images": images, "dataset": "coco"})


@layout("coco_captions")
def coco_captions(folder):
    karpathy(folder / "dataset_coco.json", "val2014")


@layout("flickr30k")
def flickr30k(folder):
    karpathy(folder / "dataset_flickr30k.json", None)


@layout("nocaps")
def nocaps(folder):
    images, annotations = [], []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "images" / f"{number:016x}.jpg", colour)
        images.append({"id": number, "file_name": name, "coco_url": "", "domain": "near-domain", "open_images_id": ""})
        annotations += [{"image_id": number, "id": 2 * number + k, "caption": f"a {colour} square {k}"} for k in (0, 1)]
    put(folder / "nocaps_val_4500_captions.json", {"licenses": [], "images": images, "annotations": annotations})


@layout("llava_questions")
def llava_questions(folder):
    questions, answers = [], []
    for number, colour in enumerate(COLOURS):
        name = show(folder / "images" / f"{number:03d}.jpg", colour)
        questions.append({"question_id": number, "image": name, "text": "What is it?", "category": "conv"})
        answers.append({"question_id": number, "prompt": "What is it?", "text": f"It is a {colour} square."})
    put(folder / "questions.jsonl", questions)
    put(folder / "answers_gpt4.jsonl", answers)
