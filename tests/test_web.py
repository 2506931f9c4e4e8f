"""examples/web.py, by an HTTP client: what it paints, says, refuses and never shows.

The truth for pictures is the command line. tests/test_web_browser.py looks at the page itself.
"""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from base64 import b64decode, b64encode

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.reference import ROOT, cli, flat_controlnet, kohya_names

RED_HOUSE = ROOT / "tiny" / "red-house.png"
SMALL = {"prompt": "a red house", "seed": 7, "steps": 3, "width": 64, "height": 64}
LONG = SMALL | {"steps": 999, "width": 256, "height": 256}  # minutes
A, B = "a" * 32, "b" * 32  # two pages


class Server:
    """examples/web.py in a process of its own, and an HTTP client."""

    def __init__(self, folder, *options):
        command = [sys.executable, ROOT / "examples" / "web.py", "--port=0", "--no-browser"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder)}
        self.folder, self.pictures, self.errors = folder, folder / "pictures", folder / "errors"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [*command, *map(str, options)],
                cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        found = re.match(r"http://\S+:(\d+)/ is ready", self.process.stdout.readline())
        assert found, self.errors.read_text()
        self.port, self.headers = int(found[1]), {}  # of all requests

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def connect(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | self.headers
        connection.request(method, path, body, headers)
        return connection, connection.getresponse()

    def ask(self, method, path, body=None, **headers):
        """-> status, body: of JSON the value"""
        connection, answer = self.connect(method, path, body, **headers)
        with contextlib.closing(connection):
            data = answer.read()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, json.loads(data) if is_json else data

    def upload(self, data, path="/inputs"):
        return self.ask("POST", path, data, Content_Type="application/octet-stream")

    def post(self, settings, client=""):
        body = json.dumps({"settings": settings, "client": client})
        return self.ask("POST", "/jobs", body, Content_Type="application/json")

    @contextlib.contextmanager
    def page(self, client):
        """A page's events: yields a function that waits until they tell something."""
        connection, answer = self.connect("GET", f"/events?client={client}")

        def until(good):
            for line in answer:
                if line.startswith(b"data: "):
                    jobs = {job["number"]: job for job in json.loads(line[6:])["jobs"]}
                    with contextlib.suppress(KeyError):  # the first ones are older than the job
                        if good(jobs):
                            return jobs
            raise AssertionError("the events ended")

        with contextlib.closing(connection):
            yield until
            answer.close()

    def paint(self, settings):
        """-> the job at its end"""
        status, told = self.post(settings, A)
        assert status == 202, told
        number = told["number"]
        with self.page(A) as until:
            return until(lambda jobs: jobs[number]["state"] in ENDS)[number]


ENDS = ("done", "cancelled", "failed")


@pytest.fixture(scope="module")
def shelf(lora, controlnet, tmp_path_factory):
    """A folder with a LoRA in a folder of it, a ControlNet, and what is neither."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "styles").mkdir()
    save_file(kohya_names(lora), folder / "styles" / "odd.safetensors")
    flat_controlnet(controlnet, folder).rename(folder / "edges.flat.safetensors")
    (folder / "notes.safetensors").write_text("no tensors")
    return folder


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("web"), "--folder", shelf)
    yield server
    server.stop()


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def text_of(path):
    with Image.open(path) as picture:
        return picture.text["parameters"]


def same(a, b):
    with Image.open(a) as one, Image.open(b) as other:
        return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


# %% What is painted -------------------------------------------------------------------------------

WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def check_equal(server, settings, *options):
    """Painted by a page and by the command line: the same pixels, and the same text."""
    job = server.paint(SMALL | settings)
    assert job["state"] == "done", job
    done = cli(*WORDS, *options, "--output", "cli.png", cwd=server.folder)
    assert done.returncode == 0, done.stderr
    ours = re.findall(r"saved (\S+)", done.stdout)
    assert len(ours) == len(job["pictures"]) > 0
    for mine, name in zip(ours, job["pictures"]):
        status, data = server.ask("GET", f"/pictures/{name}")
        assert status == 200 and data == (server.pictures / name).read_bytes()
        assert same(server.folder / mine, io.BytesIO(data))
        assert text_of(server.folder / mine) == text_of(io.BytesIO(data))
        (server.folder / mine).unlink()
    return job


def test_a_picture_is_the_command_lines(server):
    settings = {"negative_prompt": "a tree: café", "n_images": 2, "sampler": "dpm++", "cfg": 3}
    job = check_equal(
        server, settings,
        "--negative-prompt=a tree: café", "--n-images=2", "--sampler=dpm++", "--cfg=3",
    )  # fmt: skip
    assert job["pictures"] == ["a-red-house-7.png", "a-red-house-8.png"]
    seeds = [each["seed"] for each in server.ask("GET", "/pictures")[1]]
    assert {"7", "8"} <= set(seeds)


def test_the_rest_of_the_settings_are_the_command_lines(server):
    settings = {
        "seed": "3,9", "spacing": "trailing", "rescale": "0.5", "rng": "philox", "clip_skip": 2,
        "upscale": 1.5, "upscale_strength": 0.7, "plain_prompt": True, "prompt": "(a) house",
    }  # fmt: skip
    words = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "plain_prompt"]
    check_equal(server, settings, *words, "--plain-prompt")


def test_image_to_image_and_inpainting_are_the_command_lines(server):
    status, told = server.upload(RED_HOUSE.read_bytes())
    assert status == 201 and told["size"] == [128, 128] == told["fit"]
    mask = Image.new("L", (128, 128))
    mask.paste(255, (30, 20, 90, 70))
    (_, white) = server.upload(png(mask))
    image, hole = (f"pictures/inputs/{each['name']}" for each in (told, white))
    settings = {"image": told["name"], "strength": 0.7}
    check_equal(server, settings, "--image", image, "--strength=0.7")
    settings |= {"mask": white["name"], "strength": 1}
    job = check_equal(server, settings, "--image", image, "--mask", hole, "--strength=1")
    assert any("painting 18%" in note for note in job["notes"]), job["notes"]
    assert (server.pictures / "inputs" / told["name"]).read_bytes() == RED_HOUSE.read_bytes()


def test_a_lora_and_a_controlnet_are_the_command_lines_and_leave_nothing(server, shelf):
    """The model is another one while it has a LoRA, and then the first again."""
    told = server.ask("GET", "/about")[1]
    assert told["loras"] == ["styles/odd"]
    assert told["controlnets"] == ["edges"]
    plain = server.paint(SMALL)["pictures"]
    lora = check_equal(
        server, {"loras": {"styles/odd": 0.8}},
        f"--lora={shelf}/styles/odd.safetensors:0.8",
    )["pictures"]  # fmt: skip
    name = server.upload(RED_HOUSE.read_bytes())[1]["name"]
    control = {"name": "edges", "weight": 0.5, "image": name}
    controlled = check_equal(
        server, {"controlnet": control},
        f"--controlnet={shelf}/edges.flat.safetensors:0.5",
        f"--control-image=pictures/inputs/{name}",
    )["pictures"]  # fmt: skip
    again = server.paint(SMALL)["pictures"]
    paths = [server.pictures / names[0] for names in (plain, again, lora, controlled)]
    assert same(*paths[:2]) and not same(*paths[1:3]) and not same(paths[1], paths[3])
    assert (shelf / "styles" / "odd.flat.safetensors").is_file()
    assert server.ask("GET", "/about")[1]["loras"] == ["styles/odd"]


def test_it_is_made_again_from_its_own_picture(server):
    """Also where it was painted from a picture, with a LoRA and a ControlNet."""
    name = server.upload(RED_HOUSE.read_bytes())[1]["name"]
    control = {"name": "edges", "weight": 0.5, "image": name}
    settings = SMALL | {"width": 128, "height": 128, "sampler": "euler"}
    settings["loras"] = {"styles/odd": 0.5}
    settings |= {"image": name, "strength": 0.5, "controlnet": control, "negative_prompt": "a, b"}
    (first,) = server.paint(settings)["pictures"]
    data = (server.pictures / first).read_bytes()
    status, told = server.upload(data, "/settings")
    assert status == 200 and told["notes"] == []
    assert told == server.ask("GET", f"/pictures/{first}/settings")[1]
    (second,) = server.paint(told["settings"])["pictures"]
    assert first != second and same(server.pictures / first, server.pictures / second)
    assert text_of(server.pictures / first) == text_of(server.pictures / second)


def test_what_a_picture_names_and_is_not_here_is_said(server):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 2, Seed: 3, Size: 64x64, Model: other, "
                  "Lora: /etc/gone.safetensors:0.5, Image: /etc/passwd, dtype: float16, "
                  "Denoising strength: 0.5, Version: sd.py")  # fmt: skip
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    status, told = server.upload(file.getvalue(), "/settings")
    notes = " ".join(told["notes"])
    assert status == 200 and told["settings"]["prompt"] == "a cat"
    assert "image" not in told["settings"] and told["settings"]["loras"] == {}
    assert "passwd, is not here" in notes and "lora gone is not in the folder" in notes
    assert "float16" in notes and "model other" in notes and "/tmp" not in notes
    status, told = server.upload(png(Image.new("RGB", (8, 8))), "/settings")
    assert status == 400 and told["message"] == "The picture: it does not say how it was made."


def test_previews_come_with_the_steps(server):
    with server.page(A) as until:
        number = server.post(SMALL | {"steps": 30, "n_images": 2}, A)[1]["number"]
        seen = []

        def look(jobs):
            if jobs[number]["previews"]:
                seen.append((jobs[number]["step"], tuple(jobs[number]["previews"])))
            return jobs[number]["state"] in ENDS

        job = until(look)[number]
    assert job["state"] == "done" and job["previews"] == []
    steps = [step for step, _ in seen]
    assert steps == sorted(steps) and len(set(steps)) > 3 and job["steps"] == 30
    assert len({previews for _, previews in seen}) > 3
    for address in seen[-1][1]:
        picture = Image.open(io.BytesIO(b64decode(address.removeprefix("data:image/png;base64,"))))
        assert picture.size == (8, 8)
    assert len(seen[-1][1]) == 2


# %% What is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, field, message", [
    ({"steps": 0}, "steps", "steps must be 1 to 999, got 0."),
    ({"steps": "many"}, "steps", "steps: invalid int value: 'many'."),
    ({"width": 65}, "width", "width must be a multiple of 8, and 64 at least, got 65."),
    ({"sampler": "fast"}, "sampler", "sampler must be one of plms"),
    ({"cfg": "nan"}, "cfg", "cfg must be a finite number, got nan."),
    ({"seed": "9-7"}, "seed", "seed: the seeds 9-7 run backwards."),
    ({"n_images": 101}, "n_images", "n_images must be at most 100 in all, got 101."),
    ({"upscale": 9}, "upscale", "upscale must be more than 1"),
    ({"strength": 0.5}, "strength", "strength needs a picture"),
    ({"mask": "x"}, "mask", "the mask is not here any more"),
    ({"rng": "dice"}, "rng", "rng: invalid choice: 'dice'"),
    ({"steps": [5]}, "steps", "steps must be a text or a number, got [5]."),
    ({"steps": True}, "steps", "steps must be a text or a number, got True."),
    ({"model": "/etc/passwd"}, "", "model is no setting here."),
    ({"output": "/tmp/x.png"}, "", "output is no setting here."),
    ({"loras": {"../x": 1}}, "loras", "lora ../x is not in the folder any more."),
    ({"loras": ["x"]}, "loras", "loras must be a table"),
    ({"controlnet": {"name": "edges"}}, "controlnet", "the picture for controln"),
    ([], "", "this is no setting here."),
])  # fmt: skip
def test_wrong_settings_are_a_sentence_beside_the_field(server, settings, field, message):
    settings = SMALL | settings if isinstance(settings, dict) else settings
    status, told = server.post(settings)
    assert status == 400 and told["message"].startswith(message), told
    assert told["field"] == field and "--help" not in told["message"]


def test_what_is_found_wrong_later_is_told_by_the_job(server):
    name = server.upload(RED_HOUSE.read_bytes())[1]["name"]
    job = server.paint(SMALL | {"image": name, "strength": 0.1})
    assert job["state"] == "failed" and job["field"] == "strength"
    assert job["message"].startswith("strength for 3 steps must be enough for 1 step")
    assert server.paint(SMALL)["state"] == "done"


def test_a_prompt_is_a_prompt(server):
    """Not an option, not a path, whatever letters it has."""
    for prompt in (
        "--image=/etc/passwd",
        "-h",
        "~",
        "\0\ud800\x1b[2J",
        "<lora:../../x:1>",
        "x " * 4000,
    ):
        job = server.paint(SMALL | {"prompt": prompt, "steps": 1})
        assert job["state"] == "done", (prompt[:50], job["message"])
        (name,) = job["pictures"]
        assert "/" not in name and (server.pictures / name).is_file()
    assert any("lora" in note for note in server.paint(SMALL | {"prompt": "<lora:gone>"})["notes"])


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"{", b"\xff", b"[" * 100_000, b"1"])
def test_what_is_no_json_is_a_sentence(server, body):
    status, told = server.ask("POST", "/jobs", body, Content_Type="application/json")
    assert status == 400 and told["message"].startswith("These are no settings")


def bomb(width, height):
    """A PNG whose header tells of far more pixels than it has."""
    part = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                               + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = part(b"IDAT", zlib.compress(bytes(1 << 20))) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + rest


@pytest.mark.parametrize("data", [
    b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n",
    RED_HOUSE.read_bytes()[:2000], bomb(60_000, 60_000), bomb(7000, 7000),
])  # fmt: skip
@pytest.mark.parametrize("path", ["/inputs", "/settings"])
def test_what_is_no_picture_is_a_sentence(server, data, path):
    status, told = server.upload(data, path)
    assert status == 400, told
    assert "Traceback" not in told["message"] and "/tmp" not in told["message"]


def test_too_large_an_upload_is_refused(server):
    for path in ("/inputs", "/settings"):
        with contextlib.suppress(ConnectionError):  # it need not listen to the end
            status, told = server.upload(bytes(33 << 20), path)
            assert status == 413 and "at most 32 MiB" in told["message"]
    long = SMALL | {"prompt": "x" * (1 << 20)}
    with contextlib.suppress(ConnectionError):
        assert server.post(long)[0] == 413
    assert server.paint(SMALL | {"steps": 1})["state"] == "done"


# %% The queue -------------------------------------------------------------------------------------


def test_two_pages_see_one_queue_and_cancel_at_once(server):
    with server.page(A) as first, server.page(B) as second:
        one = server.post(LONG, A)[1]["number"]
        first(lambda jobs: jobs[one]["step"] > 0)
        two = server.post(SMALL, B)[1]["number"]
        for until, mine in ((first, one), (second, two)):
            jobs = until(lambda jobs: two in jobs)
            assert [jobs[n]["place"] for n in (one, two)] == [1, 2]
            assert [jobs[n]["mine"] for n in (one, two)] == [n == mine for n in (one, two)]
        before = set(server.pictures.iterdir())
        assert server.ask("DELETE", f"/jobs/{one}")[0] == 204
        ended = first(lambda jobs: jobs[one]["state"] in ENDS)[one]
        assert ended["state"] == "cancelled" and ended["step"] < 999
        jobs = second(lambda jobs: jobs[two]["state"] in ENDS)
        assert jobs[two]["state"] == "done"
        assert {each.name for each in set(server.pictures.iterdir()) - before} == {
            *jobs[two]["pictures"]
        }
    assert server.ask("DELETE", f"/jobs/{two}")[0] == 204  # there is nothing to cancel
    assert server.ask("DELETE", "/jobs/99999")[0] == 204


def test_who_waits_can_be_cancelled_too(server):
    with server.page(A) as until:
        one, two = (server.post(LONG, A)[1]["number"] for _ in range(2))
        server.ask("DELETE", f"/jobs/{two}")
        assert until(lambda jobs: jobs[two]["state"] in ENDS)[two]["state"] == "cancelled"
        server.ask("DELETE", f"/jobs/{one}")
        assert until(lambda jobs: jobs[one]["state"] in ENDS)[one]["state"] == "cancelled"


def test_what_a_page_that_is_gone_had_asked_for_is_cancelled(server):
    with server.page(A) as until:
        with server.page(B):
            number = server.post(LONG, B)[1]["number"]
            waiting = server.post(LONG, B)[1]["number"]
            until(lambda jobs: jobs[number]["step"] > 0)
        with server.page(B):  # loaded anew within seconds
            until(lambda jobs: jobs[number]["step"] > 20)
        jobs = until(lambda jobs: jobs[number]["state"] in ENDS and jobs[waiting]["state"] in ENDS)
    assert jobs[number]["state"] == jobs[waiting]["state"] == "cancelled"


# %% What can't be reached -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "../secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "%2e%2e/secret.png", "..%5cx.png",
    "%2fetc%2fpasswd", "//etc/passwd", "inputs/../../secret.png", "inputs%2fx.png", "link.png",
    ".hidden.png", "%00.png", "a%00.png", "notes.txt", "%ff.png", "", ".", "..",
])  # fmt: skip
def test_nothing_outside_the_folder_is_read(server, name):
    picture = png(Image.new("RGB", (8, 8), "red"))
    for path in (server.folder / "secret.png", server.pictures / ".hidden.png",
                 server.pictures / "notes.txt"):  # fmt: skip
        path.write_bytes(picture)
    (server.pictures / "link.png").unlink(missing_ok=True)
    (server.pictures / "link.png").symlink_to(server.folder / "secret.png")
    for path in (f"/pictures/{name}", f"/pictures/{name}/settings", f"/inputs/{name}", f"/{name}"):
        status, data = server.ask("GET", path)
        assert status in (307, 400, 404, 405) or path == "/" and status == 200, path
        assert data != picture
    names = {each["name"] for each in server.ask("GET", "/pictures")[1]}
    assert not names & {"link.png", ".hidden.png", "notes.txt", "secret.png"}


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "..", "", ["x"], {"a": 1}, 5])
def test_names_of_uploads_are_no_paths(server, name):
    (server.folder / "secret.png").write_bytes(RED_HOUSE.read_bytes())
    control = {"name": "edges", "image": name}
    for settings in ({"image": name}, {"mask": name}, {"controlnet": control}):
        if name == "" and "controlnet" not in settings:
            continue  # none
        status, told = server.post(SMALL | settings)
        assert status == 400 and "not here any more" in told["message"], told


def test_nothing_else_was_written(server):
    """Beside the output folder and what the tests wrote."""
    ours = {"pictures", "errors", "secret.png", "sd.py"}
    assert {each.name for each in server.folder.iterdir()} <= ours
    names = [each.name for each in (server.pictures / "inputs").iterdir()]
    assert names and all(re.fullmatch(r"[0-9a-f]{20}\.png", name) for name in names)


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
    "10.0.0.1", "[::2]", "", "[", "127.0.0.1@evil.example",
])  # fmt: skip
def test_another_host_name_is_refused(server, host):
    status, told = server.ask("GET", "/pictures", Host=host)
    assert status in (400, 421) and b"seed" not in json.dumps(told, default=str).encode()


def test_its_own_names_are_not_refused(server):
    for host in ("127.0.0.1", "localhost", "localhost:1234", "[::1]:8000", "LOCALHOST"):
        assert server.ask("GET", "/about", Host=host)[0] == 200


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"}, {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
])  # fmt: skip
def test_another_sites_page_is_refused(server, headers):
    body = json.dumps({"settings": SMALL})
    kind = {"Content_Type": "application/json"}
    assert server.ask("POST", "/jobs", body, **kind, **headers)[0] == 403
    assert server.ask("DELETE", "/jobs/1", **headers)[0] == 403
    assert server.ask("GET", "/pictures", **headers)[0] == 403


def test_its_own_page_is_not_refused(server):
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Sec_Fetch_Site": "same-origin"}
    assert server.ask("DELETE", "/jobs/99999", **own)[0] == 204
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert server.ask("GET", "/", **link)[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "image/png"]
)
def test_a_form_cannot_post(server, kind):
    """Forms send only three kinds, without asking first, and none of them is taken."""
    for path in ("/jobs", "/inputs", "/settings"):
        assert server.ask("POST", path, b"{}", Content_Type=kind)[0] == 415


def test_all_answers_have_the_headers_that_protect(server):
    for path in ("/", "/web.js", "/about", "/pictures", "/nothing", "/events?client=" + A):
        connection, answer = server.connect("GET", path)
        with contextlib.closing(connection):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            policy = answer.headers["content-security-policy"]
            assert (
                "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            )
            assert answer.headers["server"] is None
            assert answer.headers["access-control-allow-origin"] is None
            answer.close()


def test_the_page_asks_nobody_else():
    """No address of another server in the page's files, and nothing inline that would need one."""
    for name in ("web.html", "web.css", "web.js", "web_mask.js"):
        text = (ROOT / "examples" / name).read_text("utf-8")
        assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
    html = (ROOT / "examples" / "web.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", html)


def test_nobody_is_shown_a_traceback(server):
    """And the server had none to show."""
    assert "Traceback" not in server.errors.read_text()


# %% How it begins and ends ------------------------------------------------------------------------


def test_other_addresses_than_this_machines_need_a_password(tmp_path):
    start = lambda *options: cli("--port=0", "--no-browser", *options, cwd=tmp_path,
                                 script="examples/web.py")  # fmt: skip
    for options, message in (
        (["--host=0.0.0.0"], "--host 0.0.0.0 needs a password: give --password TEXT."),
        (["--host=0.0.0.0", "--password="], "needs a password"),
        (["--host=0.0.0.0", "--password=short"], "--password must be at least 8 characters long"),
        (["--host=::", "--password"], "needs a password"),
        (["--prompts=x"], "--prompts is for the page, or for python sd.py."),
        (["--image=x"], "--image is for the page"),
        (["--stesp=3"], "--stesp"),
        (["a", "house"], "a prompt is for the page, or for python sd.py."),
        (["--port=70000"], "--port must be 0 to 65535, got 70000."),
        (["--model=gone.safetensors"], "gone.safetensors"),
        (["--folder=gone"], "--folder: there is no folder gone"),
    ):
        done = start(*options)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = start(f"--port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "Address already in use. Try another --port" in done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A server for more than this machine."""
    options = "--host=0.0.0.0", "--password=correct horse", "--low-memory"
    server = Server(tmp_path_factory.mktemp("house"), *options)
    yield server
    server.stop()


def basic(password, name="anybody"):
    return {"Authorization": "Basic " + b64encode(f"{name}:{password}".encode()).decode()}


def test_nothing_is_shown_without_the_password(house):
    for path in ("/", "/web.js", "/about", "/pictures", f"/events?client={A}", "/nothing"):
        connection, answer = house.connect("GET", path)
        with contextlib.closing(connection):
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")
    assert house.upload(RED_HOUSE.read_bytes())[0] == 401
    assert house.ask("DELETE", "/jobs/1")[0] == 401
    wrong = [basic("wrong horse"), basic(""), basic("correct horse "), {"Authorization": "Basic *"},
             {"Authorization": "Bearer correct horse"}, {"Authorization": "Basic"}]  # fmt: skip
    for headers in wrong:
        assert house.ask("GET", "/about", **headers)[0] == 401
    for name in ("anybody", "", "me"):
        assert house.ask("GET", "/about", **basic("correct horse", name))[0] == 200


def test_with_a_password_too_strangers_names_are_refused(house):
    good = basic("correct horse")
    assert house.ask("GET", "/about", Host="evil.example", **good)[0] == 421
    assert house.ask("GET", "/about", Host="192.168.1.5:8000", **good)[0] == 200
    assert house.ask("GET", "/about", Host=f"{socket.gethostname()}:8000", **good)[0] == 200
    assert house.ask("GET", "/about", Origin="http://evil.example", **good)[0] == 403


def test_with_a_password_it_paints_too(house, monkeypatch):
    """In little memory, as the command line says."""
    monkeypatch.setattr(house, "headers", basic("correct horse"))
    check_equal(house, {}, "--low-memory")


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_it_at_once_and_says_so(tmp_path, busy):
    server = Server(tmp_path)
    try:
        with server.page(A) as until:
            if busy:
                number = server.post(LONG, A)[1]["number"]
                until(lambda jobs: jobs[number]["step"] > 0)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(60) == 130
        assert server.errors.read_text().split("\n")[-2:] == ["web.py: stopped", ""]
        assert "Traceback" not in server.errors.read_text()
        assert list(server.pictures.iterdir()) == []
    finally:
        server.stop()
