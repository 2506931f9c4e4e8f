"""The page that explain.py makes: what it says and shows of a Study, see there.

    page, pictures = write_page(study)

Each section of the page is a function. What is around them, the style and the script are in
explain_page.html.
"""

import base64
import html
import io
import json
import math
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

import sd
from sd_more.output import slug

TEMPLATE = Path(__file__).with_name("explain_page.html")
COLUMNS = 7  # steps in the film strip
MOST_PIXELS = 256  # along a picture's longer side in the page; the PNGs have all
NOISY = ("euler-a", "lcm")  # samplers that add new noise, and end elsewhere

# %% Pictures --------------------------------------------------------------------------------------

HEAT = np.array([(10, 10, 35), (90, 25, 100), (200, 60, 70), (250, 150, 50), (255, 245, 190)])


def heat(values, size):
    """(h, w) in [0, 1] -> a PIL picture, dark to bright"""
    at = np.clip(values, 0, 1) * (len(HEAT) - 1)
    colours = np.stack([np.interp(at, range(len(HEAT)), channel) for channel in HEAT.T], -1)
    return Image.fromarray(np.uint8(colours + 0.5)).resize(size, Image.NEAREST)


def glow(values):
    """(h, w) in [0, 1] -> a PIL picture of one colour, clear where values are 0"""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (255, 96, 0), np.clip(values, 0, 1) * 225 + 0.5
    return Image.fromarray(pixels)


def overlaid(picture, values):
    """As the page shows it: the glow over the picture in grey"""
    grey = picture.convert("L").convert("RGBA")
    return Image.alpha_composite(grey, glow(values).resize(grey.size, Image.BILINEAR))


def data_uri(picture):
    picture, file = picture.copy(), io.BytesIO()
    large = max(picture.size) > MOST_PIXELS // 2
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.LANCZOS)
    picture.save(file, "WEBP" if large else "PNG", quality=90)
    kind, code = "webp" if large else "png", base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind};base64,{code}"


class Album:
    """The page's pictures: {name: PIL picture}, for --png."""

    def __init__(self):
        self.pictures = {}

    def add(self, name, picture, alt, kind=""):
        """-> the picture's tag"""
        self.pictures[name] = picture
        return image(data_uri(picture), picture.size, alt, kind)


def image(source, size, alt, kind="", more=""):
    small = " pixels" if max(size) <= MOST_PIXELS // 2 else ""
    return (
        f'<img class="{kind}{small}" src="{source}" width="{size[0]}" height="{size[1]}" '
        f'alt="{html.escape(alt)}"{more}>'
    )


# %% Plots -----------------------------------------------------------------------------------------


class Plot:
    """A plot in SVG. x, y: the ranges; ticks: {number: text} for each axis"""

    width, height, left, right, top, bottom = 440, 300, 54, 12, 14, 44

    def __init__(self, title, x, y, x_ticks, y_ticks, x_label, y_label):
        self.title, self.x, self.y, self.axes, self.parts = title, x, y, [], []
        for number, text in x_ticks.items():
            place, _ = self.at(number, y[0])
            self.text(place, self.height - self.bottom + 17, text, "middle")
            self.grid(place, self.top, place, self.height - self.bottom)
        for number, text in y_ticks.items():
            _, place = self.at(x[0], number)
            self.text(self.left - 6, place + 4, text, "end")
            self.grid(self.left, place, self.width - self.right, place)
        self.text((self.left + self.width) / 2, self.height - 6, x_label, "middle")
        self.text(-self.height / 2 + 15, 13, y_label, "middle", "rotate(-90)")

    def at(self, x, y):
        """Numbers -> places"""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        w, h = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + across * w, self.height - self.bottom - up * h

    def text(self, x, y, text, anchor, turned=""):
        turned = f' transform="{turned}"' if turned else ""
        words = html.escape(text)
        self.axes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{words}</text>'
        )

    def grid(self, x1, y1, x2, y2):
        path = f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"
        self.axes.append(f'<path class="grid" d="{path}"/>')

    def line(self, points, kind):
        path = "L".join("{:.1f} {:.1f}".format(*self.at(x, y)) for x, y in points)
        self.parts.append(f'<path class="line {kind}" d="M{path}"/>')

    def dots(self, points, kind, radius=3):
        for x, y in (self.at(*point) for point in points):
            self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')

    def svg(self):
        """What leaves the ranges is cut off, with room for half a dot."""
        x, y, room = self.left, self.top, 6
        w, h = self.width - x - self.right, self.height - y - self.bottom
        box = f"{x - room} {y - room} {w + 2 * room} {h + 2 * room}"
        place = 'x="{}" y="{}" width="{}" height="{}"'.format(*box.split())
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(self.title)}">{"".join(self.axes)}'
            f'<svg {place} viewBox="{box}">{"".join(self.parts)}</svg></svg>'
        )


def pick(items, count):
    """The first, the last, and evenly from between."""
    at = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(i)] for i in at]


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.array(x, np.float64)))))


def ticks(low, high):
    """-> {number: text}, some five round numbers in the range"""
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return {i * step: f"{i * step:g}" for i in range(first, last + 1)}


def around(points, share=0.06):
    """(n, 2) -> the range of x, the range of y, with some room"""
    low, high = points.min(0), points.max(0)
    room = np.maximum(high - low, 1e-6) * share
    return [*zip(low - room, high + room)]


def principal(paths):
    """{name: (n, numbers)} -> the same in the two directions in which all of them differ most, and
    the share of the variance that is in these (principal components)"""
    every = np.concatenate([*paths.values()])
    mean = every.mean(0)
    _, lengths, directions = np.linalg.svd(every - mean, full_matrices=False)
    share = (lengths[:2] ** 2).sum() / max(1e-30, (lengths**2).sum())
    return {name: (path - mean) @ directions[:2].T for name, path in paths.items()}, share


# %% Parts of the page -----------------------------------------------------------------------------


def where(places):
    """(section, name, name ...) each -> where in sd.py one finds it"""
    told = "; ".join(
        f"section {n}: " + ", ".join(f'<code data-section="{n}">{name}</code>' for name in names)
        for n, *names in places
    )
    return f'<p class="where">In sd.py, {told}.</p>'


def figure(tag, caption):  # caption: HTML
    return f"<figure>{tag}<figcaption>{caption}</figcaption></figure>"


def cards(figures, kind=""):
    return f'<div class="cards {kind}">{"".join(figures)}</div>'


def key(colour, text):
    return f'<span class="named"><span class="{colour} key"></span> {text}</span>'


def table(label, head, rows, kind=""):
    """In a box that scrolls by itself, by keys, too. rows: (title, [cell]), all of it HTML"""
    top = "".join(f'<th scope="col">{text}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{title}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for title, cells in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{html.escape(label)}">'
        f"<table><thead><tr><td></td>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def at_time(t):
    return f"t\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{t:.0f}"


# %% The page's sections ---------------------------------------------------------------------------
# Each: (a Study, an Album) -> what one sees, where in sd.py it is computed, the rest of its HTML.


def explain_tokens(study, album):
    tokenizer, pieces = study.model.tokenizer, [("start", sd.START)]
    for _, parts, ids in tokenizer.split(study.prompt):
        pieces += zip(parts, ids)
    pieces = [*pieces[:76], ("end", sd.END)]
    chips = [f"<b>{html.escape(piece)}</b> <span>{i}</span>" for piece, i in pieces]
    if fill := 77 - len(pieces):
        chips.append(f"<b>padding</b> <span>{tokenizer.pad}</span> &times; {fill}")
    width = study.model.config.text["width"]
    prose = f"""
The sentence in pieces that the text model has a vector for, each with its number; &lt;/w&gt; marks
a word's end. With the marks of start and end, and padding, there are always 77. CLIP turns them
into 77 vectors of {width} numbers, the context, which is all that the UNet gets to see of the
prompt."""
    places = [(2, "Tokenizer.split", "Tokenizer.bpe", "Tokenizer.encode"), (4, "TextEncoder")]
    chips = "".join(f'<li class="token">{chip}</li>' for chip in chips)
    return prose, places, f'<ul class="tokens">{chips}</ul>'


def explain_schedule(study, album):
    schedule, steps = study.model.schedule, [*study.run.answers]
    times, x_ticks = np.arange(0, 1000, 9), {t: str(t) for t in (0, 250, 500, 750, 999)}
    title = f"abar and 1 - abar over t; the run's {len(steps)} timesteps as dots"
    share = Plot(title, (0, 999), (0, 1), x_ticks, ticks(0, 1), "t", "share of the variance")
    share.line([(t, 1 - schedule.abar(t)) for t in times], "s1 dashed")
    share.line([(t, schedule.abar(t)) for t in times], "s0")
    share.dots([(t, schedule.abar(t)) for t in steps], "s0")
    height = lambda t: math.log10(min(schedule.sigma(t), 4096))  # it may be infinite
    y = height(0), height(999)
    y_ticks = {n: f"{10.0**n:g}" for n in range(-2, 4) if y[0] <= n <= y[1]}
    title = "sigma over t, on a logarithmic axis; the run's timesteps as dots"
    ratio = Plot(title, (0, 999), y, x_ticks, y_ticks, "t", "sigma")
    ratio.line([(t, height(t)) for t in times], "s2")
    ratio.dots([(t, height(t)) for t in steps], "s2")
    told = [f"{at_time(t)}, where sigma is {schedule.sigma(t):.3g}" for t in steps]
    prose = f"""
How much of x is noise at each timestep t: abar is the share of the picture's variance that is left,
sigma the ratio of noise to signal. The dots are the {len(steps)} timesteps of this run, from
{told[0]}, to {told[-1]}. The UNet is called {study.run.calls} times."""
    places = [(1, "scaled_linear", "Schedule.abar", "Schedule.sigma", "Schedule.timesteps")]
    captions = key("s0", "abar, picture") + " " + key("s1", "1 - abar, noise")
    figures = figure(share.svg(), captions), figure(ratio.svg(), key("s2", "sigma"))
    return prose, places, cards(figures, "wide")


def explain_film(study, album):
    answers = [study.run.answers[t] for t in pick([*study.run.answers], COLUMNS)]
    rows, spread = [], deviation(study.run.path[-1])
    for name, tells in (
        ("x", "what the UNet sees"),
        ("eps", "the noise in it, as the UNet says"),
        ("x0", "x without that noise"),
    ):
        latents = [vars(answer)[name] for answer in answers]
        pictures = study.decode(
            latents if name == "x0" else [to_spread(y, spread) for y in latents]
        )
        tags = [
            album.add(f"{name}-t{a.t:03.0f}", picture, f"{name} at {at_time(a.t)}: {tells}")
            for a, picture in zip(answers, pictures)
        ]
        rows.append((f"<b>{name}</b> {tells}", tags))
    prose = f"""
Three arrays of latents at some of the steps, turned into pictures by the VAE's decoder. x and eps
are multiplied so that they have the final latents' standard deviation ({spread:.2f}), as the
decoder has learned to read numbers of that size; x0 is as it is. At a large t many pictures could
have made this x, and the x0 that follows from it is their mean, a blur; the smaller t, the sharper
it is."""
    places = [
        (1, "Schedule.x0_and_eps", "Schedule.remove_noise"),
        (6, "VAE.decode"),
        (7, "sample_ddim", "sample_plms"),
        (8, "StableDiffusion.decode"),
    ]
    return prose, places, table("Film strip", [at_time(a.t) for a in answers], rows)


def deviation(y):
    return float(np.array(y).std())


def to_spread(y, spread):
    return y * (spread / max(deviation(y), 1e-12))


def all_maps(study):
    """-> (steps, h, w, 77): how much of its attention each position gave to each token"""
    return np.stack([answer.maps for answer in study.run.answers.values()])


def word_maps(study):
    """-> (words, steps, h, w): the same for a word, of all its tokens together"""
    maps = all_maps(study)
    return np.stack([maps[..., word.positions].sum(-1) for word in study.words])


def stretched(maps):
    """From their lowest to their highest value: to [0, 1]"""
    low, high = maps.min(), maps.max()
    return (maps - low) / max(high - low, 1e-12)


def explain_words(study, album):
    (final,), figures, frames = study.decode(study.run.path[-1:]), [], []
    base = image(data_uri(final), final.size, "", "grey")
    times = [at_time(t) for t in study.run.answers]
    for i, (word, maps) in enumerate(zip(study.words, word_maps(study))):
        mean, each = stretched(maps.mean(0)), stretched(maps)
        album.pictures[f"word-{slug(word.text)}"] = overlaid(final, mean)
        frames.append([data_uri(glow(frame)) for frame in each])
        told = f'Where the picture looked at "{word.text}", '
        still = image(data_uri(glow(mean)), final.size, told + "mean of all steps", "over")
        now = f' data-word="{i}"'  # the script looks for it
        moving = image(frames[i][0], final.size, told + "one step", "over", now)
        both = "".join(f'<div class="stack">{base}{over}</div>' for over in (still, moving))
        title = f"<b>{html.escape(word.text)}</b> {maps.mean():.1%} of the attention"
        figures.append(figure(f'<div class="pair">{both}</div>', title))
    shares = all_maps(study).mean((0, 1, 2))
    pieces = sum(len(ids) for *_, ids in study.model.tokenizer.split(study.prompt))
    end = min(pieces, 75) + 1  # the end mark's position
    prose = f"""
In cross-attention each position of the latents spreads its attention over the 77 tokens: numbers
that sum to 1. Here is how much each word got, the mean over all heads of all
{study.layers} layers, laid over the picture in grey: left the mean over all steps, right the
step that the slider chooses. Each is scaled by itself, from its lowest to its highest value. Most
attention may go to tokens that are no words: here {shares[0]:.0%} to the mark of the start, and
{shares[end:].sum():.0%} to that of the end and the padding behind it."""
    places = [(3, "AttentionCore", "Attention"), (5, "TransformerBlock", "once_per_sentence")]
    data = json.dumps({"times": times, "frames": frames}).replace("<", "\\u003c")
    body = f"""
<p class="slider"><label for="time">Step</label>
<input type="range" id="time" min="0" max="{len(times) - 1}" value="0" aria-valuetext="{times[0]}">
<output id="now" for="time">{times[0]}</output></p>
{cards(figures, "words")}
<script type="application/json" id="maps">{data}</script>"""
    return prose, places, body


def explain_guidance(study, album):
    spread, times = deviation(study.run.path[-1]), [*study.asked]
    (x0_without, eps_without), (x0_with, eps_with) = (
        zip(*pairs) for pairs in zip(*study.asked.values())
    )
    changes = [np.array(b - a)[0] for a, b in zip(eps_without, eps_with)]  # (h, w, 4) each
    lengths = [np.sqrt(np.square(change).sum(-1)) for change in changes]
    most = max(1e-12, *(length.max() for length in lengths))
    scaled = [[to_spread(y, spread) for y in each] for each in (eps_without, eps_with)]
    rows = []
    for name, title, pictures in (
        ("eps-without", "<b>eps</b> without the prompt", study.decode(scaled[0])),
        ("eps-with", "<b>eps</b> with it", study.decode(scaled[1])),
        ("eps-difference", "<b>difference</b>, brighter where larger", None),
        ("x0-without", "<b>x0</b> without the prompt", study.decode(x0_without)),
        ("x0-with", "<b>x0</b> with it", study.decode(x0_with)),
    ):
        pictures = pictures or [heat(length / most, study.size()) for length in lengths]
        tags = [
            album.add(f"{name}-t{t:03.0f}", picture, f"{name} at {at_time(t)}")
            for t, picture in zip(times, pictures)
        ]
        if name == "eps-difference":
            shares = [rms(change) / rms(eps) for change, eps in zip(changes, eps_with)]
            tags = [f"{tag}{share:.1%} of eps" for tag, share in zip(tags, shares)]
        rows.append((title, tags))
    several, own = [], study.sampling["cfg"]
    pictures = study.decode([run.path[-1] for run in study.cfgs.values()])
    for cfg, picture in zip(study.cfgs, pictures):
        tag = album.add(f"cfg-{cfg:g}", picture, f"{study.prompt}, at cfg {cfg:g}")
        several.append(figure(tag, f"cfg {cfg:g}" + ", this run's" * (cfg == own)))
    prose = """
The UNet answers twice for the same x, without the prompt and with it. Both eps are mostly the noise
in x, and look alike; their difference, of which the length at each position is shown, is what the
prompt changes. Guidance goes from the first answer to the second, and beyond: cfg times the
difference. Below, the same seed with several cfg; at 1 the answer with the prompt is taken as it
is."""
    places = [
        (5, "once_per_sentence"),
        (8, "StableDiffusion.predict", "StableDiffusion.denoiser"),
    ]
    strip = table("With and without the prompt", map(at_time, times), rows)
    return prose, places, strip + cards(several)


def flat_path(run):
    """-> (1 + steps, numbers of x)"""
    return np.stack([np.array(x, np.float64).ravel() for x in run.path])


def final_errors(study):
    """-> {sampler: how far its last x is from the reference's, relative to the latter's length}"""
    exact = np.array(study.reference.path[-1])
    return {
        name: rms(np.array(run.path[-1]) - exact) / rms(exact)
        for name, run in study.samplers.items()
    }


def draw_paths(title, flat, colours, x, y):
    """-> SVG of paths in the plane. flat: {name: (n, 2)}; colours: {name: class}"""
    plot = Plot(title, x, y, ticks(*x), ticks(*y), "first direction", "second direction")
    plot.line(flat["reference"], "reference")
    for name, colour in colours.items():
        plot.line(flat[name], colour + " dashed" * (name in NOISY))
        plot.dots(flat[name], colour, 2)
        plot.dots(flat[name][-1:], colour, 5)
    plot.dots(flat["reference"][-1:], "target", 6)
    return plot.svg()


def explain_samplers(study, album):
    paths = {name: flat_path(run) for name, run in study.samplers.items()}
    paths["reference"] = np.stack(pick(flat_path(study.reference), 25))
    flat, share = principal(paths)
    colours = {name: f"s{i % 7}" for i, name in enumerate(study.samplers)}
    ends = np.stack([path[-1] for name, path in flat.items() if name not in NOISY])
    everywhere = around(np.concatenate([*flat.values()]))
    keys = [key(colour, html.escape(name)) for name, colour in colours.items()]
    title, enlarged = "From noise to the picture, a dot a step", "The end of that, enlarged"
    plots = (
        figure(draw_paths(title, flat, colours, *everywhere), f"{title}<br>{' '.join(keys)}"),
        figure(draw_paths(enlarged, flat, colours, *around(ends, 0.3)), enlarged),
    )
    errors, rows = final_errors(study), []
    order = sorted(errors, key=errors.get)
    pictures = study.decode([study.samplers[name].path[-1] for name in order])
    for name, picture in zip(order, pictures):
        run = study.samplers[name]
        tag = album.add(f"sampler-{slug(name)}", picture, f"{study.prompt}, by {name}")
        note = "adds new noise on the way, and ends at another picture" * (name in NOISY)
        begins = at_time(next(iter(run.answers)))
        cells = [f"{errors[name]:.1%}", tag, str(run.calls), begins, note]
        rows.append((key(colours[name], html.escape(name)), cells))
    numbers, exact = paths["reference"].shape[1], study.exact
    prose = f"""
All samplers begin with the same noise, ask the UNet the same question and take as many steps. Their
paths, each x being {numbers} numbers, are drawn in the two directions in which all of these x
differ most ({share:.0%} of the variance). The error is how far the last x is from that of
{exact["steps"]} steps of {exact["sampler"]}, the broad grey line with a ring at its end, relative
to the latter's length. A part of it is that noise passes for x at the first timestep, which is not
the same for all, and that plms and ddim leave in the noise of {at_time(0)}."""
    places = [
        (7, "sample_ddim", "sample_plms"),
        (8, "StableDiffusion.generate_latents"),
        (11, "in_sigmas", "sample_euler"),
    ]
    head = ["error", "picture", "UNet calls", "begins at", ""]
    return prose, places, cards(plots, "wide") + table("Samplers", head, rows, "numbers")


def explain_exchange(study, album):
    old, new, other, run = study.exchange
    before, after = study.decode([study.run.path[-1], run.path[-1]])
    change = np.abs(np.asarray(before, float) - np.asarray(after, float)).mean(-1)  # (8h, 8w)
    most, size = change.max(), before.size
    told = f"the difference, {change.mean():.0f} of 255 levels on average"
    figures = [
        figure(album.add(f"exchange-{name}", picture, alt), html.escape(alt))
        for name, picture, alt in (
            ("before", before, study.prompt),
            ("after", after, other),
            ("difference", heat(change / max(most, 1), size), told),
        )
    ]
    old, new = (f"<mark>{html.escape(word)}</mark>" for word in (old, new))
    prose = f"""
The same seed, and so the same noise to begin with, and everything else the same, but {old} is {new}
now. In the context only the vectors from that word's on differ, as no token sees those behind it.
Dark is where the two pictures are the same; the brightest is a difference of {most:.0f} of 255
levels, the mean of the three colours."""
    places = [
        (4, "TextLayer"),
        (8, "StableDiffusion.encode_prompts", "StableDiffusion.generate_latents"),
        (9, "torch_normal"),
    ]
    return prose, places, cards(figures, "large")


# %% The page --------------------------------------------------------------------------------------

SECTIONS = {
    "tokens": ("The prompt in tokens", explain_tokens),
    "schedule": ("How much noise, and when", explain_schedule),
    "film": ("From noise to the picture", explain_film),
    "words": ("Which word drew which part", explain_words),
    "guidance": ("What guidance adds", explain_guidance),
    "samplers": ("The samplers' paths", explain_samplers),
    "exchange": ("One word exchanged", explain_exchange),
}


def write_page(study):
    """-> the page's text, {name: picture}"""
    album, sections, contents = Album(), [], []
    (final,) = study.decode(study.run.path[-1:])
    picture = album.add("final", final, f"The picture that was painted: {study.prompt}")
    for number, (name, (title, explain)) in enumerate(SECTIONS.items(), 1):
        prose, places, body = explain(study, album)
        contents.append(f'<li><a href="#{name}">{title}</a></li>')
        sections.append(
            f'<section aria-labelledby="{name}">\n<h2 id="{name}">{number}. {title}</h2>\n'
            f"<p>{prose.strip()}</p>\n{where(places)}\n{body}\n</section>"
        )
    used = study.sampling
    settings = (
        f"{study.model.config.name}, {used['width']} x {used['height']}, seed {used['seed']}, "
        f"{used['steps']} steps of {used['sampler']}, cfg {used['cfg']:g}"
    )
    page = Template(TEMPLATE.read_text("utf-8")).substitute(
        prompt=html.escape(study.prompt), settings=html.escape(settings), picture=picture,
        contents="\n".join(contents), sections="\n\n".join(sections),
    )  # fmt: skip
    return page, album.pictures
