// Survivors over the picture. A raster of tokens lies over a box of the picture; outside of the picture is padding.
const loaded = new Map();

function picture(index) { // a promise of the decoded picture
  if (!loaded.has(index)) {
    const image = new Image();
    image.src = DATA.pictures[index].d;
    loaded.set(index, image.decode().then(() => image));
  }
  return loaded.get(index);
}

function hatching(context, size) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const own = tile.getContext("2d");
  own.fillStyle = "#c9cdd2";
  own.fillRect(0, 0, size, size);
  own.strokeStyle = "#8b929a";
  own.lineWidth = size / 10;
  own.beginPath();
  own.moveTo(0, size);
  own.lineTo(size, 0);
  own.stroke();
  return context.createPattern(tile, "repeat");
}

// Draws one raster of a trace; `image` is null where tokens are shown without the picture.
function drawRaster(canvas, trace, raster, image, size, layer) {
  const [rows, columns] = raster.grid, [left, top, right, bottom] = raster.box;
  const aspect = ((right - left) * size[0]) / ((bottom - top) * size[1]);
  const width = 640, height = Math.max(Math.round(width / aspect), 16);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), cellW = width / columns, cellH = height / rows;
  context.fillStyle = image ? hatching(context, 14) : "#4c78c9";
  context.fillRect(0, 0, width, height);
  const x = (value) => (value - left) / (right - left) * width, y = (value) => (value - top) / (bottom - top) * height;
  if (image) context.drawImage(image, x(0), y(0), x(1) - x(0), y(1) - y(0));
  if (trace.k !== null) {
    const depth = depths(trace);
    context.fillStyle = "rgba(255, 255, 255, 0.82)";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (depth[raster.first + row * columns + column] > layer) continue;
        if (layer >= 0) context.fillRect(column * cellW, row * cellH, cellW + 0.5, cellH + 0.5);
      }
    }
  }
  tileBorders(context, raster, width, height, image !== null);
  (trace.m || []).forEach((group, i) => {
    if (group[0] <= layer && layer <= group[1]) outline(context, members(group), raster, cellW, cellH, i);
  });
}

function tileBorders(context, raster, width, height, shown) {
  const [columns, rows] = raster.tiles;
  if (!shown || columns * rows < 2) return;
  // A window cut out of the raster has fewer tokens than the tiles; crops are squares of equal numbers of tokens.
  const side = raster.side || Math.max(raster.grid[0] / rows, raster.grid[1] / columns);
  const skipX = (columns * side - raster.grid[1]) / 2, skipY = (rows * side - raster.grid[0]) / 2;
  for (const [color, wide] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = wide;
    context.setLineDash([10, 8]);
    context.beginPath();
    for (let i = 1; i < columns; i++) { const at = (i * side - skipX) / raster.grid[1] * width; context.moveTo(at, 0); context.lineTo(at, height); }
    for (let i = 1; i < rows; i++) { const at = (i * side - skipY) / raster.grid[0] * height; context.moveTo(0, at); context.lineTo(width, at); }
    context.stroke();
  }
  context.setLineDash([]);
}

// The border of a set of cells: every side that no other member shares.
function outline(context, patches, raster, cellW, cellH, turn) {
  const [rows, columns] = raster.grid, within = new Set();
  for (const patch of patches) {
    const place = patch - raster.first;
    if (place >= 0 && place < rows * columns) within.add(place);
  }
  const path = new Path2D();
  for (const place of within) {
    const row = Math.floor(place / columns), column = place % columns;
    const x = column * cellW, y = row * cellH;
    const side = (joined, x1, y1, x2, y2) => { if (!joined) { path.moveTo(x1, y1); path.lineTo(x2, y2); } };
    side(row > 0 && within.has(place - columns), x, y, x + cellW, y);
    side(row < rows - 1 && within.has(place + columns), x, y + cellH, x + cellW, y + cellH);
    side(column > 0 && within.has(place - 1), x, y, x, y + cellH);
    side(column < columns - 1 && within.has(place + 1), x + cellW, y, x + cellW, y + cellH);
  }
  for (const [color, wide] of [["#fff", 5], [`hsl(${(turn * 137) % 360} 85% 38%)`, 3]]) {
    context.strokeStyle = color;
    context.lineWidth = wide;
    context.stroke(path);
  }
}

function survivorWords(trace, layer) {
  if (layer < 0 || !trace.o.length) return `all ${trace.v} visual tokens`;
  const after = Math.min(layer, counts(trace).length - 1), left = counts(trace)[after];
  if (trace.k === null) return `${left} tokens`;
  const patches = depths(trace).reduce((sum, depth) => sum + (depth > after ? 1 : 0), 0);
  return `${patches} patches` + (left > patches ? ` + ${left - patches} merged` : "");
}

// What a card shows: canvases, one per raster, and a line of words. Drawn anew by `redraw`.
function survivors(question, answer) {
  const box = element("div", {}), words = element("p", { class: "small" }), trace = answer.r;
  const plain = () => question.p.filter((index) => index !== null).map((index) => {
    const own = DATA.pictures[index];
    return { raster: { grid: [1, 1], box: [0, 0, 1, 1], tiles: [1, 1], first: 0, image: 0 }, index, size: [own.w, own.h], trace: { k: null, m: null } };
  });
  let parts = [], note = "";
  if (!trace) parts = plain();
  else if (trace.k === null) { parts = plain(); if (trace.v) note = "This trace does not say which tokens survive (--trace-kept)."; }
  else if (trace.w === null) {
    const side = Math.ceil(Math.sqrt(trace.v));
    parts = [...plain(), { raster: { grid: [Math.ceil(trace.v / side), side], box: [0, 0, 1, 1], tiles: [1, 1], first: 0 }, index: null, size: [side, Math.ceil(trace.v / side)], trace }];
    note = "The tokens in their order: the trace does not say where they lie in the picture.";
  } else {
    parts = DATA.rasters[trace.w].map((raster) => {
      const index = question.p[raster.image], known = index !== null && index !== undefined;
      const own = known ? DATA.pictures[index] : { w: raster.grid[1], h: raster.grid[0] };
      return { raster, index: known ? index : null, size: [own.w, own.h], trace };
    });
  }
  for (const part of parts) {
    part.canvas = element("canvas", { role: "img" });
    box.append(part.canvas);
  }
  box.append(words);
  if (note) box.append(element("p", { class: "small" }, note));
  const redraw = async () => {
    const layer = trace && trace.o.length ? Math.min(state.layer, counts(trace).length - 1) : -1;
    const text = trace ? survivorWords(trace, layer) : question.p.length ? "the picture; this run has no trace" : "";
    words.textContent = text;
    for (const part of parts) {
      part.canvas.setAttribute("aria-label", `${text}${layer < 0 ? "" : ` after layer ${layer}`}`);
      const image = part.index === null ? null : await picture(part.index).catch(() => null);
      const wanted = trace && trace.o.length ? Math.min(state.layer, counts(trace).length - 1) : -1;
      drawRaster(part.canvas, part.trace, part.raster, image, part.size, wanted);
    }
    box.setAttribute("data-layer", String(layer));
  };
  return [box, redraw];
}
