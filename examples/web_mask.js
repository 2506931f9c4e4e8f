// A mask that is brushed over a picture: white where it is to be painted anew. It is kept as a list
// of strokes, so that each can be undone, and drawn anew from them.

const LONGEST = 1024; // pixels of the mask that is sent

export class Mask {
  // canvas: lies over img, and shows the strokes half transparent.
  constructor(canvas, img, changed) {
    Object.assign(this, { canvas, img, changed, tool: "brush", size: 12 });
    Object.assign(this, { strokes: [], stroke: null, at: null });
    img.addEventListener("load", () => this.fit());
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => this.up());
    canvas.addEventListener("pointercancel", () => this.up());
    canvas.addEventListener("pointerleave", () => { this.at = null; this.draw(); });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.up());
  }

  fit() {
    const scale = Math.min(1, LONGEST / Math.max(this.img.naturalWidth, this.img.naturalHeight));
    this.canvas.width = Math.round(this.img.naturalWidth * scale);
    this.canvas.height = Math.round(this.img.naturalHeight * scale);
    const ratio = this.canvas.width / Math.max(1, this.canvas.height);
    this.canvas.parentElement.style.setProperty("--ratio", ratio);
    this.draw();
  }

  // The brush's diameter is a share of the longer side, so that it looks the same in all pictures.
  width() {
    return (this.size / 100) * Math.max(this.canvas.width, this.canvas.height);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width,
            ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  begin(point) {
    this.stroke = { tool: this.tool, width: this.width(), points: [point] };
    this.strokes.push(this.stroke);
  }

  down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.begin(this.point(event));
    this.draw();
  }

  move(event) {
    this.at = this.point(event);
    if (this.stroke) {
      for (const each of event.getCoalescedEvents?.() ?? [event]) {
        this.stroke.points.push(this.point(each));
      }
    }
    this.draw();
  }

  up() {
    if (this.stroke) {
      this.stroke = null;
      this.changed();
    }
    this.draw();
  }

  key(event) {
    const step = Math.max(this.canvas.width, this.canvas.height) / (event.shiftKey ? 10 : 40);
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.at ??= [this.canvas.width / 2, this.canvas.height / 2];
    if (event.key in ways) {
      const [x, y] = ways[event.key];
      const clip = (n, most) => Math.min(most, Math.max(0, n));
      this.at = [clip(this.at[0] + x * step, this.canvas.width),
                 clip(this.at[1] + y * step, this.canvas.height)];
      this.stroke?.points.push(this.at);
    } else if (event.key === " ") {
      if (this.stroke) this.up(); else this.begin(this.at);
    } else if (event.key === "[" || event.key === "]") {
      this.size = Math.min(50, Math.max(2, this.size + (event.key === "]" ? 2 : -2)));
      this.changed();
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
    this.draw();
  }

  undo() {
    this.stroke = null;
    this.strokes.pop();
    this.draw();
    this.changed();
  }

  add(tool) { // "invert" and "clear" are strokes, too, and can be undone
    this.strokes.push({ tool });
    this.draw();
    this.changed();
  }

  reset() {
    this.strokes = [];
    this.draw();
    this.changed();
  }

  load(picture) { // a mask that is there already, white where it is to be painted
    const layer = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
    const c = layer.getContext("2d");
    c.drawImage(picture, 0, 0);
    const pixels = c.getImageData(0, 0, layer.width, layer.height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
    c.putImageData(pixels, 0, 0);
    this.strokes = [{ tool: "picture", picture: layer }];
    this.draw();
  }

  // Opaque white where it is to be painted; elsewhere nothing.
  render() {
    const { width, height } = this.canvas;
    const layer = new OffscreenCanvas(Math.max(1, width), Math.max(1, height));
    const c = layer.getContext("2d");
    Object.assign(c, { lineCap: "round", lineJoin: "round" });
    Object.assign(c, { strokeStyle: "#fff", fillStyle: "#fff" });
    for (const { tool, points, width: line, picture } of this.strokes) {
      const how = { eraser: "destination-out", invert: "xor" }[tool];
      c.globalCompositeOperation = how ?? "source-over";
      if (tool === "clear") c.clearRect(0, 0, width, height);
      else if (tool === "invert") c.fillRect(0, 0, width, height);
      else if (tool === "picture") c.drawImage(picture, 0, 0, width, height);
      else {
        c.lineWidth = line;
        c.beginPath();
        c.moveTo(...points[0]);
        for (const point of points) c.lineTo(...point);
        c.stroke();
      }
    }
    return layer;
  }

  draw() {
    const { width, height } = this.canvas;
    if (!width || !height) return;
    const c = this.canvas.getContext("2d");
    c.clearRect(0, 0, width, height);
    c.globalAlpha = 0.65;
    c.drawImage(this.render(), 0, 0);
    c.globalCompositeOperation = "source-atop";
    c.globalAlpha = 1;
    c.fillStyle = "rgb(230 0 160)"; // a colour that few pictures have
    c.fillRect(0, 0, width, height);
    c.globalCompositeOperation = "source-over";
    if (this.at) this.ring(c);
  }

  ring(c) { // the brush, black and white, so that it is seen on every picture
    const pixel = width_of(this.canvas);
    for (const [line, style] of [[3, "#000"], [1.5, "#fff"]]) {
      c.beginPath();
      c.arc(...this.at, this.width() / 2, 0, 7);
      c.lineWidth = line * pixel;
      c.strokeStyle = style;
      c.stroke();
    }
  }

  empty() {
    const { width, height } = this.canvas;
    if (!this.strokes.length || !width) return true;
    const { data } = this.render().getContext("2d").getImageData(0, 0, width, height);
    return !data.some((value, i) => i % 4 === 3 && value > 127);
  }

  async blob() { // a PNG, white on black
    const { width, height } = this.canvas;
    const sheet = new OffscreenCanvas(width, height);
    const c = sheet.getContext("2d");
    c.fillRect(0, 0, width, height);
    c.drawImage(this.render(), 0, 0);
    return sheet.convertToBlob({ type: "image/png" });
  }
}

function width_of(canvas) { // how many of its pixels one of the screen's is
  return canvas.width / Math.max(1, canvas.getBoundingClientRect().width);
}
