"use strict";
// A list of tens of thousands of rows of which only those in view are in the page.

const ROW = 36, BEYOND = 8;

class Rows {
  // `draw(node, i)` fills the row of number i; `open(i)` is what Enter does.
  constructor(label, draw, open) {
    this.draw = draw;
    this.n = 0;
    this.at = 0;
    this.pool = [];
    this.sheet = h("div", { class: "sheet" });
    this.node = h("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": label }, this.sheet);
    this.node.addEventListener("scroll", () => this.later(), { passive: true });
    this.node.addEventListener("keydown", event => {
      const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.n, End: this.n }[event.key];
      if (step) this.go(this.at + step);
      else if (event.key === "Enter" && this.n) open(this.at);
      else return;
      event.preventDefault();
    });
    new ResizeObserver(() => this.later()).observe(this.node);
  }

  show(n, at = 0) {
    this.n = n;
    this.sheet.style.height = `${n * ROW}px`;
    for (const row of this.pool) row.i = -1;
    this.go(at);
  }

  go(i) {
    this.at = Math.max(0, Math.min(i, this.n - 1));
    const top = this.at * ROW, { scrollTop, clientHeight } = this.node;
    if (top < scrollTop) this.node.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.node.scrollTop = top + ROW - clientHeight;
    this.paint();
  }

  later() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.paint();
    });
  }

  paint() {
    const { scrollTop, clientHeight } = this.node;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - BEYOND);
    const last = Math.min(this.n, Math.ceil((scrollTop + clientHeight) / ROW) + BEYOND);
    while (this.pool.length < last - first) {
      const node = h("a", { class: "row", role: "option", tabindex: "-1" });
      this.pool.push({ i: -1, node });
      this.sheet.append(node);
    }
    // Row i always has the same place of the pool, so that scrolling by one redraws one.
    for (let place = 0; place < this.pool.length; place++) {
      const row = this.pool[place], size = this.pool.length;
      const i = first + ((((place - first) % size) + size) % size);
      row.node.hidden = i >= last;
      if (i >= last) continue;
      if (row.i !== i) {
        row.i = i;
        row.node.id = `row-${i}`;
        row.node.style.transform = `translateY(${i * ROW}px)`;
        row.node.setAttribute("aria-posinset", i + 1);
        row.node.setAttribute("aria-setsize", this.n);
        this.draw(row.node, i);
      }
      row.node.setAttribute("aria-selected", i === this.at);
    }
    if (this.n) this.node.setAttribute("aria-activedescendant", `row-${this.at}`);
    else this.node.removeAttribute("aria-activedescendant");
  }
}
