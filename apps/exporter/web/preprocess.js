// Preprocessing of images, as in evaluation: antialiased resize in float32 like Pillow's, then crop,
// truncation to integers and normalization. The browser decodes the image.

const FILTERS = {
  bilinear: { support: 1, weight: (x) => (Math.abs(x) < 1 ? 1 - Math.abs(x) : 0) },
  bicubic: {
    support: 2,
    weight: (x) => {
      x = Math.abs(x);
      const a = -0.5;
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

/** Round half to even, as Python and NumPy. */
function round(x) {
  const down = Math.floor(x);
  const rest = x - down;
  return rest < 0.5 || (rest === 0.5 && down % 2 === 0) ? down : down + 1;
}

/** Return the box [left, top, right, bottom] of an image that becomes the square of `size`. */
export function box(width, height, size, fit) {
  if (fit === "squash") return [0, 0, width, height];
  const ratio = Math.fround(Math.fround(size) / Math.fround(Math.min(width, height)));
  const across = width / round(Math.fround(Math.fround(width) * ratio));
  const down = height / round(Math.fround(Math.fround(height) * ratio));
  const left = Math.floor((round(width / across) - size) / 2);
  const top = Math.floor((round(height / down) - size) / 2);
  return [left * across, top * down, (left + size) * across, (top + size) * down];
}

/** Return the weights of the pixels from `first` for each of `size` positions in [start, stop). */
function coefficients(side, start, stop, size, { support, weight }) {
  const scale = (stop - start) / size;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: size }, (_, i) => {
    const center = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const last = Math.min(side, Math.trunc(center + reach + 0.5));
    const weights = new Float64Array(last - first);
    let sum = 0;
    for (let k = 0; k < weights.length; k++) {
      weights[k] = weight((k + first - center + 0.5) / stretch);
      sum += weights[k];
    }
    for (let k = 0; k < weights.length; k++) weights[k] /= sum;
    return { first, weights };
  });
}

/**
 * Resize pixels to a square.
 *
 * @param {Uint8Array | Uint8ClampedArray} pixels [height, width, 3].
 * @param {number} width width.
 * @param {number} height height.
 * @param {{image_size: number, fit: string, resample: string}} settings preprocessor.json.
 * @returns {Uint8Array} [size, size, 3].
 */
export function resize(pixels, width, height, settings) {
  const size = settings.image_size;
  const [left, top, right, bottom] = box(width, height, size, settings.fit);
  const filter = FILTERS[settings.resample];
  const columns = coefficients(width, left, right, size, filter);
  const rows = coefficients(height, top, bottom, size, filter);
  const firstRow = Math.min(...rows.map((row) => row.first));
  const lastRow = Math.max(...rows.map((row) => row.first + row.weights.length));
  const narrow = new Float32Array((lastRow - firstRow) * size * 3);
  for (let y = firstRow; y < lastRow; y++) {
    for (let x = 0; x < size; x++) {
      const { first, weights } = columns[x];
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0, at = (y * width + first) * 3 + c; k < weights.length; k++, at += 3) {
          sum += weights[k] * pixels[at];
        }
        narrow[((y - firstRow) * size + x) * 3 + c] = sum;
      }
    }
  }
  const out = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    const { first, weights } = rows[y];
    for (let x = 0; x < size * 3; x++) {
      let sum = 0;
      for (let k = 0, at = (first - firstRow) * size * 3 + x; k < weights.length; k++, at += size * 3) {
        sum += weights[k] * narrow[at];
      }
      out[y * size * 3 + x] = Math.min(255, Math.max(0, Math.trunc(Math.fround(sum))));
    }
  }
  return out;
}

/** Return float32 [3, size, size] of pixels [size, size, 3], with the mean and std of the model. */
export function normalize(pixels, { image_size, mean, std }) {
  const count = image_size * image_size;
  const out = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) out[c * count + i] = (pixels[3 * i + c] / 255 - mean[c]) / std[c];
  }
  return out;
}

/** Compose RGBA over white, rounded like Pillow; return RGB. */
export function overWhite(rgba) {
  const out = new Uint8Array((rgba.length / 4) * 3);
  for (let i = 0, o = 0; i < rgba.length; i += 4, o += 3) {
    const alpha = rgba[i + 3];
    for (let c = 0; c < 3; c++) out[o + c] = Math.round((rgba[i + c] * alpha + 255 * (255 - alpha)) / 255);
  }
  return out;
}

const MAX_PIXELS = 64_000_000; // as in Python

/** Decode an image file, upright, without color management; return its pixels and size. */
export async function decode(file) {
  const bitmap = await createImageBitmap(file, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`${width} x ${height} pixels, at most ${MAX_PIXELS}`);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { pixels: overWhite(context.getImageData(0, 0, width, height).data), width, height };
}
