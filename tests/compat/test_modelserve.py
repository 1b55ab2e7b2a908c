"""Classes written for modelserve, only their import lines changed, as our workers run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdeploy.compat import modelserve
from mdeploy.compat.devices import Device
from mdeploy.serving import load
from mdeploy.serving.handler import File, Request
from tests.compat.asking import Asked, posted

# Both follow the examples of modelserve's README: a class that takes text from the query and sets
# CUDA_VISIBLE_DEVICES itself, and one that takes an uploaded image and moves its model to the device.
TEXT_TO_TEXT = """
from mdeploy.compat.modelserve import api, runserver_with_args


@api(name="custom")
class Model:
    def init(self, device):
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = device
        self.device = os.environ["CUDA_VISIBLE_DEVICES"]
        self.words = {"Hello": "Hallo", "world": "Welt"}

    def inference(self, request):
        from mdeploy.compat.modelserve import JsonResponse
        text = request.GET["text"]
        return JsonResponse({"text": " ".join(self.words.get(word, word) for word in text.split())})


if __name__ == "__main__":
    runserver_with_args()
"""
IMAGE_TO_TEXT = """
from mdeploy.compat.modelserve import api, runserver_with_args


@api(name="custom")
class Model:
    def init(self, device):
        self.device = device

    def inference(self, request):
        from mdeploy.compat.modelserve import JsonResponse
        image = request.FILES["image"]
        header = image.read(8)
        image.seek(0)
        pieces = [len(piece) for piece in image.chunks(1000)]
        return JsonResponse({"text": f"{image.name} {image.size} {image.content_type}", "png": header[1:4].decode(),
                             "pieces": pieces, "device": f"{self.device}", "again": len(image.read())})


if __name__ == "__main__":
    runserver_with_args()
"""
ECHO = """
from mdeploy.compat.modelserve import Http404, HttpResponse, HttpResponseBadRequest, api


class Gone(Http404):
    pass


@api
class Echo:
    timeout = 5

    def inference(self, request):
        what = request.GET.get("answer")
        if what == "text":
            return "<b>hi</b>"
        if what == "bytes":
            return b"\\x00\\x01"
        if what == "html":
            response = HttpResponse("hé", status=201, headers={"X-One": "1"})
            response["X-Two"] = 2
            return response
        if what == "bad":
            return HttpResponseBadRequest("no")
        if what == "gone":
            raise Gone("no such voice")
        if what == "broken":
            raise RuntimeError("secret detail")
        return {
            "method": request.method, "path": request.path, "get": dict(request.GET.lists()),
            "post": request.POST.dict(), "all": request.POST.getlist("a"), "body": request.body.decode(),
            "type": request.content_type, "header": request.headers["x-name"], "meta": request.META["HTTP_X_NAME"],
            "length": request.META.get("CONTENT_LENGTH"), "query": request.META["QUERY_STRING"],
            "cookie": request.COOKIES.get("c"), "files": [f.read().decode() for f in request.FILES.getlist("f")],
        }
"""


def write(tmp_path: Path, text: str, name: str = "example_model.py") -> Path:
    (file := tmp_path / name).write_text(text)
    return file


def test_text_to_text_runs_with_its_imports_changed(tmp_path: Path) -> None:
    ask = Asked(write(tmp_path, TEXT_TO_TEXT))
    assert (ask.info.name, ask.info.path, ask.info.max_batch_size) == ("custom", "/custom", 1)
    assert ask.info.source == str(tmp_path / "example_model.py")
    reply = ask(Request("GET", "/custom", b"text=Hello%20world"))
    assert (reply.status, reply.media_type, reply.body) == (200, "application/json", b'{"text": "Hallo Welt"}')


def test_a_class_that_selects_its_gpu_by_the_environment_selects_the_one_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    ask = Asked(write(tmp_path, TEXT_TO_TEXT), "cuda:0")
    assert ask.handler.model.device == "3"


def test_the_device_of_a_start_script_reaches_init_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # by the pool
    monkeypatch.setenv(modelserve.DEVICE_VARIABLE, "cuda:1")
    monkeypatch.setenv(modelserve.VISIBLE_VARIABLE, "")
    assert Asked(write(tmp_path, IMAGE_TO_TEXT), "cuda:0").handler.model.device == "cuda:1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv(modelserve.VISIBLE_VARIABLE, "4,5")
    Asked(write(tmp_path, IMAGE_TO_TEXT), "cuda:0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_image_to_text_gets_its_upload(tmp_path: Path) -> None:
    ask = Asked(write(tmp_path, IMAGE_TO_TEXT), "cuda:0")
    content = b"\x89PNG\r\n\x1a\n" + b"x" * 2492
    reply = ask(Request("POST", "/custom", files=[File("image", "demo.jpg", "image/png", memoryview(content))]))
    assert json.loads(bytes(reply.body)) == {
        "text": "demo.jpg 2500 image/png",
        "png": "PNG",
        "pieces": [1000, 1000, 500],
        "device": "cuda:0",
        "again": 0,
    }


def test_a_missing_field_is_the_clients_fault(tmp_path: Path) -> None:
    reply = Asked(write(tmp_path, TEXT_TO_TEXT))(Request("GET", "/custom", b"word=x"))
    assert (reply.status, reply.code, reply.message) == (400, "missing_field", "the request has no 'text'")
    reply = Asked(write(tmp_path, IMAGE_TO_TEXT))(posted({"image": 1}))
    assert (reply.status, reply.message) == (400, "the request has no 'image'")


def test_json_bodies_headers_and_forms_arrive(tmp_path: Path) -> None:
    ask = Asked(write(tmp_path, ECHO))
    headers = ((b"X-Name", b"n"), (b"Content-Type", b"application/json; charset=utf-8"), (b"Cookie", b"c=1"))
    got = json.loads(
        bytes(ask(Request("POST", "/echo", b"a=1&a=2&b=", (*headers, (b"content-length", b"8")), b'{"x": 1}')).body)
    )
    assert got["get"] == {"a": ["1", "2"], "b": [""]}
    assert (got["body"], got["type"], got["post"]) == ('{"x": 1}', "application/json", {})
    assert (got["header"], got["meta"], got["length"], got["cookie"]) == ("n", "n", "8", "1")
    assert (got["method"], got["path"], got["query"]) == ("POST", "/echo", "a=1&a=2&b=")
    form = ((b"x-name", b"n"), (b"content-type", b"application/x-www-form-urlencoded"))
    got = json.loads(
        bytes(ask(Request("POST", "/echo", headers=form, body=b"a=1&a=%C3%A9", form=[("a", "1"), ("a", "é")])).body)
    )
    assert (got["post"], got["all"], got["body"]) == ({"a": "é"}, ["1", "é"], "a=1&a=%C3%A9")
    multipart = ((b"x-name", b"n"), (b"content-type", b"multipart/form-data; boundary=b"))
    files = [File("f", "1.txt", "text/plain", b"one"), File("f", "2.txt", "text/plain", b"two")]
    got = json.loads(bytes(ask(Request("POST", "/echo", headers=multipart, form=[("a", "1")], files=files)).body))
    assert (got["all"], got["files"]) == (["1"], ["one", "two"])
    assert json.loads(bytes(ask(Request("PUT", "/echo", headers=form, form=[("a", "1")])).body))["post"] == {}


@pytest.mark.parametrize(
    ("answer", "status", "media_type", "body"),
    [
        ("text", 200, "text/html; charset=utf-8", b"<b>hi</b>"),
        ("bytes", 200, "application/octet-stream", b"\x00\x01"),
        ("html", 201, "text/html; charset=utf-8", "hé".encode()),
        ("bad", 400, "text/html; charset=utf-8", b"no"),
    ],
)
def test_what_views_return(tmp_path: Path, answer: str, status: int, media_type: str, body: bytes) -> None:
    reply = Asked(write(tmp_path, ECHO))(Request("GET", "/echo", f"answer={answer}".encode()))
    assert (reply.status, reply.media_type, bytes(reply.body)) == (status, media_type, body)
    if answer == "html":
        assert dict(reply.headers) == {"X-One": "1", "X-Two": "2"}


def test_what_views_raise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ask = Asked(write(tmp_path, ECHO))
    assert ask.info.timeout == 5
    gone = ask(Request("GET", "/echo", b"answer=gone"))
    assert (gone.status, gone.message) == (404, "no such voice")
    broken = ask(Request("GET", "/echo", b"answer=broken"))
    assert broken.status == 500
    assert "secret" not in broken.message
    assert "secret detail" in capfd.readouterr().err


def test_relative_paths_start_beside_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from mdeploy.compat.modelserve import api

@api
class Reader:
    def init(self, device):
        with open("model/words.txt") as file:
            self.text = file.read()

    def inference(self, request):
        return {"text": self.text}
"""
    (code := tmp_path / "code" / "model").mkdir(parents=True)
    (code / "words.txt").write_text("here")
    file = write(tmp_path / "code", text, "reader.py")
    assert Asked(file)(Request("GET", "/reader")).body == b'{"text":"here"}'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(modelserve.DEVICE_VARIABLE, "cpu")  # a start script, from a directory of its own choice
    with pytest.raises(FileNotFoundError):
        Asked(file)


def test_several_classes_and_names(tmp_path: Path) -> None:
    text = "from mdeploy.compat.modelserve import api\n" + "".join(
        f"@api({argument})\nclass M{n}:\n    def inference(self, request):\n        return {n}\n"
        for n, argument in enumerate(['"a"', 'name="v1/b"', ""])
    )
    found = load.handlers(str(write(tmp_path, text, "several_models.py")))
    infos = [load.describe(cls) for cls in found]
    assert [(info.name, info.path) for info in infos] == [("a", "/a"), ("v1-b", "/v1/b"), ("m2", "/m2")]


def test_a_subclass_is_served_by_its_own_mark_only(tmp_path: Path) -> None:
    text = TEXT_TO_TEXT + "\nclass Other(Model):\n    pass\n"
    file = write(tmp_path, text, "subclassed.py")
    assert [cls.__name__ for cls in load.handlers(str(file))] == ["Model"]
    with pytest.raises(load.LoadError, match="Other"):
        load.handlers(f"{file}:Other")


def test_a_class_without_inference_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="no method inference"):
        modelserve.api(type("Empty", (), {}))


def test_a_script_that_does_not_ask_for_main_is_served_as_well(tmp_path: Path) -> None:
    text = TEXT_TO_TEXT.replace('if __name__ == "__main__":\n    runserver', "runserver")
    assert Asked(write(tmp_path, text, "unguarded.py"))(Request("GET", "/custom", b"text=x")).status == 200


def test_an_import_of_django_where_there_is_none_is_told_at_start(tmp_path: Path) -> None:
    text = TEXT_TO_TEXT.replace(
        "from mdeploy.compat.modelserve import JsonResponse", "from django.http import JsonResponse"
    )
    with pytest.raises(RuntimeError, match=r"Model.inference imports django, .* from mdeploy.compat.modelserve"):
        Asked(write(tmp_path, text))


def test_devices_survive_what_old_classes_do_with_them() -> None:
    device = Device("cuda:0", "GPU-5f")
    assert f"to {device}" == "to cuda:0"
    assert device == "cuda:0"
    assert json.dumps([device]) == '["cuda:0"]'
    assert (int(device), int(Device("0")), int(Device("cpu"))) == (0, 0, 0)
    assert device.encode() == b"cuda:0"
    assert os.fsencode(device) == b"GPU-5f"
    assert type(str(device)) is str


def test_workers_need_nothing_but_the_standard_library(tmp_path: Path) -> None:
    code = """
import sys
from mdeploy.compat import easyserve, modelserve
extra = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - before - {"mdeploy"}
print(sorted(extra))
"""
    before = "import sys; before = {name.partition('.')[0] for name in sys.modules}\n"
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
