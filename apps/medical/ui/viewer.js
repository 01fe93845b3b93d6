// Three linked planes of one volume. Axes are R, A, S; a plane is drawn from (across, up) with depth fixed.
const PLANES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] };
const LETTERS = [["L", "R"], ["P", "A"], ["I", "S"]];

function decode(data) {
  const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
  const size = new DataView(bytes.buffer, bytes.byteOffset, 4).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const count = header.shape[0] * header.shape[1] * header.shape[2];
  const start = 4 + size;
  return { header, grey: bytes.subarray(start, start + count), mask: bytes.subarray(start + count, start + 2 * count) };
}

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".mpr");
  const { header, grey, mask } = decode(data);
  const [nx, ny] = header.shape;
  const stride = [1, nx, nx * ny];
  const [low, high] = header.range;
  const colours = header.structures.map((s) => ({ ...s, colour: [...s.colour], shown: true, opacity: 1 }));
  const state = { cross: [...header.cross], centre: 0.5, width: 1.0, opacity: 0.55, radiological: true, draws: 0 };
  const status = root.querySelector(".status");
  const canvases = [...root.querySelectorAll("canvas")];
  const scratch = document.createElement("canvas");
  let pending = false;

  function lookup() {
    const table = new Uint8ClampedArray(256);
    for (let v = 0; v < 256; v++) table[v] = ((v / 255 - state.centre) / state.width + 0.5) * 255;
    return table;
  }

  function flipped(across) {
    return across === 0 && state.radiological;
  }

  function layout(canvas, across, up) {
    const size = [header.shape[across] * header.spacing[across], header.shape[up] * header.spacing[up]];
    const scale = Math.min(canvas.width / size[0], canvas.height / size[1]);
    const w = size[0] * scale, h = size[1] * scale;
    return { x: (canvas.width - w) / 2, y: (canvas.height - h) / 2, w, h };
  }

  function drawPlane(canvas, table) {
    const [across, up, depth] = PLANES[canvas.dataset.plane];
    const w = header.shape[across], h = header.shape[up];
    const ratio = window.devicePixelRatio || 1;
    const box = canvas.getBoundingClientRect();
    canvas.width = Math.max(1, Math.round(box.width * ratio));
    canvas.height = Math.max(1, Math.round(box.height * ratio));
    scratch.width = w;
    scratch.height = h;
    const pen = scratch.getContext("2d"), image = pen.createImageData(w, h), out = image.data;
    const flip = flipped(across), base = state.cross[depth] * stride[depth];
    const paint = new Map(colours.filter((s) => s.shown).map((s) => [s.value, [...s.colour, s.opacity * state.opacity]]));
    for (let j = 0; j < h; j++) {
      const line = base + (h - 1 - j) * stride[up];
      for (let i = 0; i < w; i++) {
        const at = line + (flip ? w - 1 - i : i) * stride[across], o = 4 * (j * w + i);
        const g = table[grey[at]], over = mask[at] ? paint.get(mask[at]) : undefined;
        const a = over ? over[3] : 0;
        out[o] = g * (1 - a) + (over ? over[0] * a : 0);
        out[o + 1] = g * (1 - a) + (over ? over[1] * a : 0);
        out[o + 2] = g * (1 - a) + (over ? over[2] * a : 0);
        out[o + 3] = 255;
      }
    }
    pen.putImageData(image, 0, 0);
    const view = canvas.getContext("2d"), place = layout(canvas, across, up);
    view.fillStyle = "#000";
    view.fillRect(0, 0, canvas.width, canvas.height);
    view.imageSmoothingEnabled = true;
    view.drawImage(scratch, place.x, place.y, place.w, place.h);
    const ci = flip ? w - 1 - state.cross[across] : state.cross[across], cj = h - 1 - state.cross[up];
    const cx = place.x + ((ci + 0.5) / w) * place.w, cy = place.y + ((cj + 0.5) / h) * place.h;
    view.strokeStyle = "rgba(120, 220, 120, 0.7)";
    view.lineWidth = ratio;
    view.beginPath();
    view.moveTo(cx, place.y); view.lineTo(cx, place.y + place.h);
    view.moveTo(place.x, cy); view.lineTo(place.x + place.w, cy);
    view.stroke();
    view.fillStyle = "#ffd54a";
    view.font = `bold ${15 * ratio}px sans-serif`;
    view.textBaseline = "middle";
    const [first, second] = LETTERS[across], [bottom, top] = LETTERS[up];
    view.textAlign = "left"; view.fillText(flip ? second : first, 8 * ratio, canvas.height / 2);
    view.textAlign = "right"; view.fillText(flip ? first : second, canvas.width - 8 * ratio, canvas.height / 2);
    view.textAlign = "center"; view.fillText(top, canvas.width / 2, 12 * ratio); view.fillText(bottom, canvas.width / 2, canvas.height - 12 * ratio);
  }

  function draw() {
    pending = false;
    const start = performance.now(), table = lookup();
    canvases.forEach((canvas) => drawPlane(canvas, table));
    const at = state.cross[0] + state.cross[1] * stride[1] + state.cross[2] * stride[2];
    const value = low + (grey[at] / 255) * (high - low);
    const name = (colours.find((s) => s.value === mask[at]) || { name: "" }).name;
    status.textContent = `voxel ${state.cross.join(", ")}  value ${value.toFixed(0)}  ${name}  window ${(state.width * (high - low)).toFixed(0)} level ${(low + state.centre * (high - low)).toFixed(0)}`;
    state.draws += 1;
    root.dataset.draws = String(state.draws);
    root.dataset.cross = state.cross.join(",");
    root.dataset.milliseconds = (performance.now() - start).toFixed(1);
    root.dataset.window = `${state.centre.toFixed(3)},${state.width.toFixed(3)}`;
  }
  function redraw() {
    if (!pending) { pending = true; requestAnimationFrame(draw); }
  }
  function move(axis, to) {
    state.cross[axis] = Math.min(header.shape[axis] - 1, Math.max(0, Math.round(to)));
    redraw();
  }
  function point(canvas, event) {
    const [across, up] = PLANES[canvas.dataset.plane], box = canvas.getBoundingClientRect(), place = layout(canvas, across, up);
    const x = ((event.clientX - box.left) / box.width) * canvas.width, y = ((event.clientY - box.top) / box.height) * canvas.height;
    const w = header.shape[across], h = header.shape[up];
    const i = Math.floor(((x - place.x) / place.w) * w), j = Math.floor(((y - place.y) / place.h) * h);
    move(across, flipped(across) ? w - 1 - i : i);
    move(up, h - 1 - j);
  }

  const stops = [];
  const on = (target, name, handler, options) => {
    target.addEventListener(name, handler, options);
    stops.push(() => target.removeEventListener(name, handler, options));
  };
  for (const canvas of canvases) {
    const depth = PLANES[canvas.dataset.plane][2];
    on(canvas, "wheel", (event) => { event.preventDefault(); move(depth, state.cross[depth] + (event.deltaY > 0 ? -1 : 1)); }, { passive: false });
    on(canvas, "contextmenu", (event) => event.preventDefault());
    on(canvas, "pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      root.focus({ preventScroll: true });
      root.dataset.plane = canvas.dataset.plane;
      if (event.button === 0) point(canvas, event);
    });
    on(canvas, "pointermove", (event) => {
      if (event.buttons & 1) point(canvas, event);
      if (event.buttons & 2) {
        state.width = Math.min(4, Math.max(0.02, state.width * Math.exp(event.movementX / 200)));
        state.centre = Math.min(2, Math.max(-1, state.centre + event.movementY / 400));
        redraw();
      }
    });
  }
  on(root, "keydown", (event) => {
    const depth = PLANES[root.dataset.plane || "axial"][2];
    const steps = { ArrowUp: [depth, 1], ArrowDown: [depth, -1], PageUp: [depth, 10], PageDown: [depth, -10] };
    const step = steps[event.key];
    if (step && event.target === root) { event.preventDefault(); move(step[0], state.cross[step[0]] + step[1]); }
    if (event.key === "o" && event.target === root) { state.opacity = state.opacity > 0 ? 0 : 0.55; redraw(); }
  });

  const preset = root.querySelector(".preset");
  preset.replaceChildren(...Object.keys(header.presets).map((name) => new Option(name, name)));
  preset.onchange = () => { [state.centre, state.width] = header.presets[preset.value]; redraw(); };
  const opacity = root.querySelector(".opacity");
  opacity.oninput = () => { state.opacity = Number(opacity.value) / 100; redraw(); };
  const radiological = root.querySelector(".radiological");
  radiological.onchange = () => { state.radiological = radiological.checked; redraw(); };
  root.querySelector(".structures").replaceChildren(
    ...colours.map((structure) => {
      const label = document.createElement("label"), box = document.createElement("input"), colour = document.createElement("input");
      const strength = document.createElement("input");
      box.type = "checkbox"; box.checked = true; colour.type = "color"; strength.type = "range"; strength.min = 0; strength.max = 100; strength.value = 100;
      strength.title = `opacity of ${structure.name}`;
      colour.value = "#" + structure.colour.map((c) => c.toString(16).padStart(2, "0")).join("");
      box.onchange = () => { structure.shown = box.checked; redraw(); };
      colour.oninput = () => { structure.colour = [1, 3, 5].map((i) => parseInt(colour.value.slice(i, i + 2), 16)); redraw(); };
      strength.oninput = () => { structure.opacity = Number(strength.value) / 100; redraw(); };
      label.append(box, colour, structure.name, strength);
      return label;
    }),
  );
  const watcher = new ResizeObserver(redraw);
  watcher.observe(root);
  draw();
  return () => { watcher.disconnect(); stops.forEach((stop) => stop()); };
}
