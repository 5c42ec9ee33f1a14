"use strict";
// Data arrive as scripts that call register(): browsers fetch nothing from file://.

const registered = new Map(), arriving = new Map();
const CHUNKS_KEPT = 16;

function register(key, value) {
  registered.set(key, value);
}

function load(key) {
  if (registered.has(key)) {
    const value = registered.get(key);
    registered.delete(key); // the map's order is that of last use
    registered.set(key, value);
    return Promise.resolve(value);
  }
  if (!arriving.has(key)) arriving.set(key, arrive(key).finally(() => arriving.delete(key)));
  return arriving.get(key);
}

function arrive(key) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${encodeURIComponent(key)}.js`;
    script.onload = () => {
      script.remove();
      if (registered.has(key)) resolve(registered.get(key));
      else reject(new Error(`data/${key}.js is damaged: build the site again`));
      forgetChunks();
    };
    script.onerror = () => {
      script.remove();
      reject(new Error(`data/${key}.js is missing: the build has not finished, or the folder was not copied whole`));
    };
    document.head.append(script);
  });
}

function forgetChunks() {
  const chunks = [...registered.keys()].filter(key => key.startsWith("units-"));
  for (const key of chunks.slice(0, -CHUNKS_KEPT)) registered.delete(key);
}

const DEAD = 1, ZOMBIE = 2, DENSE = 4;
const FLAGS = [["dead", DEAD], ["zombie", ZOMBIE], ["dense", DENSE]];

const groupOf = name => registered.get("site").groups.find(group => group.name === name);
const indexOf = name => load(`index-${name}`);

async function pageOf(name, unit) {
  const columns = await indexOf(name), chunk = columns.page[unit];
  if (chunk === undefined || chunk < 0) return null;
  const { strings, units } = await load(`units-${name}-${String(chunk).padStart(4, "0")}`);
  return { strings, ...units[unit] };
}
