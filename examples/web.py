"""A web page to paint with, for this machine or for a house: prompt, brush, LoRAs, a queue.

    pip install -e '.[web]' && python examples/web.py --model FILE --folder FOLDER

    page (web.html, web.js)  --settings-->  web_house.py: one queue, one model, in the main thread
                            <--events----   which step, how long still, a preview, pictures

What is painted, and the text in it, is what `python sd.py` paints and writes for the same options.
This file is the server, which runs in a second thread, and who may come in.
"""

import asyncio
import base64
import contextlib
import functools
import getpass
import hashlib
import hmac
import ipaddress
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from web_house import (
    OWN,
    Ear,
    House,
    find_field,
    name_picture,
    option,
    read_settings,
    sentence,
    small_copy,
)  # fmt: skip

import sd
from sd import SDError
from sd_more import options
from sd_more.console import command
from sd_more.noise import GENERATORS

HERE = Path(__file__).resolve().parent
PAGE = {"": "web.html"} | {name: name for name in ("web.css", "web.js", "web_mask.js")}
MOST_UPLOAD, MOST_SETTINGS = 32 << 20, 1 << 20  # bytes
GRACE, BEAT = 5, 10  # seconds: for a page that is loaded anew; between two signs of life
SHORTEST = 8  # characters of a password

# %% The server ------------------------------------------------------------------------------------


class Events(Response):
    """What goes on, as server-sent events, until the page is gone."""

    def __init__(self, house, client):
        super().__init__(media_type="text/event-stream")
        self.house, self.client = house, client

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]})  # fmt: skip
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        news.set()
        listener = functools.partial(loop.call_soon_threadsafe, news.set)
        self.house.listeners[listener] = self.client
        gone = asyncio.create_task(wait_until_gone(receive, news))
        try:
            while not gone.done():
                text = ":"  # a sign of life
                if news.is_set():
                    news.clear()
                    text = f"data: {json.dumps(self.house.state(self.client))}"
                await send({"type": "http.response.body", "body": f"{text}\n\n".encode(),
                            "more_body": True})  # fmt: skip
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), BEAT)
        finally:
            gone.cancel()
            del self.house.listeners[listener]
            loop.call_later(GRACE, self.house.leave, self.client)


async def wait_until_gone(receive, news):
    while (await receive())["type"] != "http.disconnect":
        pass
    news.set()


async def events(request):
    client = request.query_params.get("client", "")
    if not re.fullmatch("[0-9a-f]{32}", client):
        raise HTTPException(400, "A page says which one it is, by 32 hexadecimal digits.")
    return Events(request.app.state.house, client)


async def page(request):
    return FileResponse(HERE / PAGE[request.url.path[1:]], headers={"Cache-Control": "no-cache"})


def about(request):
    """What the page needs to know of the model and the folders."""
    house = request.app.state.house
    base, config = vars(house.base), house.config
    own = {name: base[name] if base[name] is not None else vars(config)[name] for name in
           ("steps", "sampler", "spacing", "cfg", "rescale")}  # fmt: skip
    own |= {} if house.guidance is None else {"cfg": house.guidance}
    own["rescale"] = own["rescale"] or None
    own |= {name: base[name] or config.size for name in ("width", "height")}
    own |= {name: base[name] for name in ("rng", "n_images", "negative_prompt")}
    own |= {"strength": 0.75, "prompt": options.DEFAULT_PROMPT, "upscale_strength": 0.5}
    return JSONResponse({
        "model": Path(base["model"]).name.removesuffix(".safetensors").removesuffix(".flat"),
        "defaults": own,
        "samplers": list(sd.SAMPLERS), "spacings": list(sd.SPACINGS), "rngs": list(GENERATORS),
        "loras": [*house.shelf.look("lora")], "controlnets": [*house.shelf.look("controlnet")],
        "folders": bool(house.shelf.folders), "most": MOST_UPLOAD,
    })  # fmt: skip


async def paint(request):
    data = await read_body(request, "application/json", MOST_SETTINGS)
    try:
        told = json.loads(data)
        settings, client = told["settings"], told.get("client", "")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise HTTPException(400, "These are no settings: JSON with a table of settings.") from None
    house = request.app.state.house
    job = await run_in_threadpool(house.submit, settings, str(client))
    told = {"number": job.number, "seed": str(job.lines[0].seed[0]), "notes": job.notes}
    return JSONResponse(told, 202)


async def cancel(request):
    request.app.state.house.cancel(request.path_params["number"])
    return Response(status_code=204)


async def upload(request):
    data = await read_body(request, "application/octet-stream", MOST_UPLOAD)
    return JSONResponse(await run_in_threadpool(take_upload, request.app.state.house, data), 201)


def take_upload(house, data):
    name = house.files.add(data)
    size = sd.open_picture(house.files.find(name)).size
    return {"name": name, "size": size, "fit": sd.fit(size, None, None, house.config.size)}


def uploaded(request):
    path = request.app.state.house.files.find(request.path_params["name"])
    return Response(small_copy(path), media_type="image/png")


async def settings_of_upload(request):
    data = await read_body(request, "application/octet-stream", MOST_UPLOAD)
    return await run_in_threadpool(answer_settings, request, data)


def settings_of_picture(request):
    return answer_settings(request, find_picture(request).read_bytes())


def answer_settings(request, data):
    house = request.app.state.house
    with tempfile.NamedTemporaryFile() as file, house.ear.hear() as notes:
        file.write(data)
        file.flush()
        settings = read_settings(file.name, house)
    notes = [name_picture(note, file.name) for note in notes]
    return JSONResponse({"settings": settings, "notes": notes})


def pictures(request):
    return JSONResponse(request.app.state.house.files.pictures())


def picture(request):
    return FileResponse(find_picture(request))


def find_picture(request):
    path = request.app.state.house.files.picture(request.path_params["name"])
    if path is None:
        raise HTTPException(404, "There is no such picture.")
    return path


async def read_body(request, kind, most):
    """-> bytes. A form of another site can't send these kinds without asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != kind:
        raise HTTPException(415, f"The Content-Type must be {kind}.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise HTTPException(413, f"That is too large: at most {most >> 20} MiB are taken.")
    return bytes(data)


def make_site(house, guard):
    """-> the ASGI application. guard: a function from an ASGI application to one."""
    routes = [Route(f"/{name}", page) for name in PAGE]
    routes += [
        Route("/about", about),
        Route("/events", events),
        Route("/jobs", paint, methods=["POST"]),
        Route("/jobs/{number:int}", cancel, methods=["DELETE"]),
        Route("/inputs", upload, methods=["POST"]),
        Route("/inputs/{name}", uploaded),
        Route("/settings", settings_of_upload, methods=["POST"]),
        Route("/pictures", pictures),
        Route("/pictures/{name}", picture),
        Route("/pictures/{name}/settings", settings_of_picture),
    ]
    handlers = {SDError: say_error, HTTPException: say_error, Exception: say_error}
    site = Starlette(routes=routes, exception_handlers=handlers)
    site.state.house = house
    return guard(site)


async def say_error(request, error):
    """What went wrong, as a sentence, and at which field."""
    if isinstance(error, HTTPException):
        return JSONResponse({"message": error.detail, "field": ""}, error.status_code)
    if isinstance(error, SDError):
        text = sentence(error)
        return JSONResponse({"message": text, "field": find_field(text)}, 400)
    return JSONResponse({"message": "something went wrong here; the terminal says what."}, 500)


# %% Who may come in -------------------------------------------------------------------------------

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """In front of everything: by which name the server is asked for, from which site, by whom.

    A browser lets any page send requests to this machine. It says of which site the page is, in
    Origin, and what it believes this server's name to be, in Host: a stranger's name that was made
    to lead here (DNS rebinding) is the stranger's.
    """

    def __init__(self, site, host, password):
        self.site, self.names, self.alone = site, own_names(host), is_loopback(host)
        self.password = password and digest(password)
        self.wrong = asyncio.Lock()

    async def __call__(self, scope, receive, send):
        request = Request(scope)
        answer = self.refuse(request)
        if answer is None and self.password and not self.knows_password(request):
            if "authorization" in request.headers:
                async with self.wrong:  # guesses are answered one a second, whoever sends them
                    await asyncio.sleep(1)
            ask = {"WWW-Authenticate": 'Basic realm="sd.py", charset="UTF-8"'}
            answer = JSONResponse({"message": "The password is wrong, or missing."}, 401, ask)

        async def sent(message):
            if message["type"] == "http.response.start":
                more = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *more]}
            await send(message)

        await (answer or self.site)(scope, receive, sent)

    def refuse(self, request):
        """-> an answer to who asks from elsewhere, or None"""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self.is_own(host_name(host)):
            message = f"This server is not called {host[:80]}: ask for it by its address."
            return JSONResponse({"message": message}, 421)
        own_site = request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        navigates = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        if origin not in (None, f"{request.url.scheme}://{host}") or not (own_site or navigates):
            return JSONResponse({"message": "Another site's page may not ask for this."}, 403)
        return None

    def is_own(self, name):
        """Where others can ask, any address of numbers will do: it is nobody's name."""
        return name in self.names or not self.alone and is_address(name)

    def knows_password(self, request):
        kind, _, code = request.headers.get("authorization", "").partition(" ")
        try:
            _, _, password = base64.b64decode(code).decode().partition(":")
        except ValueError:
            return False
        return kind.lower() == "basic" and hmac.compare_digest(digest(password), self.password)


def digest(password):
    return hashlib.sha256(password.encode(errors="replace")).digest()


def host_name(text):
    """ "[::1]:8000" -> "::1"; "" for what is none"""
    try:
        return urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return ""


def own_names(host):
    """-> the names by which the server, at the address host, may be called."""
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if is_loopback(host):
        return names
    own = socket.gethostname().lower()
    return names | {own, f"{own}.local", socket.getfqdn().lower()}


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(name):
    return name == "localhost" or is_address(name) and ipaddress.ip_address(name).is_loopback


# %% Main ------------------------------------------------------------------------------------------


def make_parser():
    p = options.Parser("web.py", description="A web page to paint with.", allow_abbrev=False,
                       epilog="Besides, for all that is painted: "
                       + ", ".join(map(option, sorted(OWN - {"safety_check"})))
                       + ", --no-safety-check, as of python sd.py.")  # fmt: skip
    # fmt: off
    p.add_argument("--model", metavar="FILE", default="tiny", help="as of python sd.py")
    p.add_argument("--folder", metavar="FOLDER", type=Path, action="append", default=[],
                   help="whose LoRAs and ControlNets the page offers; may be repeated")
    p.add_argument("--output-folder", metavar="FOLDER", type=Path, default=Path("pictures"),
                   help="where pictures are saved, and shown from; default pictures")
    p.add_argument("--port", metavar="N", type=int, default=8000,
                   help="default 8000; 0: a free one")
    p.add_argument("--host", metavar="ADDRESS", default="127.0.0.1",
                   help="0.0.0.0 for all who can reach this machine, with a password and without "
                        "encryption; default 127.0.0.1, this machine alone")
    p.add_argument("--password", metavar="TEXT", nargs="?", const="",
                   help="to be asked for by the browser, with any name; without TEXT it is asked "
                        "for here, and stands in no list of processes")
    p.add_argument("--no-browser", action="store_true", help="do not open the page")
    # fmt: on
    return p


def choose_password(args):
    """-> the password, asked for where it is needed; None for none"""
    if args.password is None and is_loopback(args.host):
        return None
    if not args.password:
        if not sys.stdin.isatty():
            raise SDError(f"--host {args.host} needs a password: give --password TEXT.")
        args.password = getpass.getpass("Password for the page: ")
    good = len(args.password) >= SHORTEST
    sd.expect(good, "--password", "a shorter one", f"at least {SHORTEST} characters long")
    return args.password


def open_socket(host, port):
    sd.expect(0 <= port < 1 << 16, "--port", port, "0 to 65535")
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=kind)
    except OSError as error:
        what = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise SDError(f"{host}, port {port}: {what}. Try another --port or --host.") from None


def serve(site, listening):
    """In a thread that ends with the program: Ctrl-C is for the main thread, which paints."""
    config = uvicorn.Config(
        site, log_level="warning", access_log=False, lifespan="off", server_header=False,
        proxy_headers=False, limit_concurrency=200,
    )  # fmt: skip
    server = uvicorn.Server(config)
    run = functools.partial(server.run, sockets=[listening])
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)


def run(args, rest, ear):
    odd = sorted(options.read_given(rest).keys() - OWN)
    if odd:
        name = "a prompt" if odd == ["words"] else option(odd[0])
        raise SDError(f"{name} is for the page, or for python sd.py.")
    password = choose_password(args)
    listening = open_socket(args.host, args.port)  # before minutes of loading
    options.choose_device(options.make_parser().parse_args(rest).device)
    house = House(rest, args.model, args.folder, args.output_folder, ear)
    serve(make_site(house, lambda site: Guard(site, args.host, password)), listening)
    name = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    name = f"[{name}]" if ":" in name else name
    address = f"http://{name}:{listening.getsockname()[1]}/"
    sd.say(f"{address} is ready; pictures are saved in {args.output_folder}/. Ctrl-C ends it.",
           sys.stdout)  # fmt: skip
    if not args.no_browser:
        webbrowser.open(address)
    house.work()


def main(argv=None):
    with command("web.py"):
        ear = Ear(sys.stderr)
        with contextlib.redirect_stderr(ear):
            args, rest = make_parser().parse_known_args(argv)
            run(args, rest, ear)


if __name__ == "__main__":
    main()
