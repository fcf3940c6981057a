// Retrieval: a query, its neighbours, and the patches that make a pair similar.
(function () {
  const status = document.getElementById("explorer-status");
  if (!status) return;
  const { queries, images, cell, side } = report.explorer;
  const neighbours = document.getElementById("explorer-neighbours");
  const match = document.getElementById("explorer-match");
  const list = document.getElementById("explorer-pairs");
  const buttons = [...document.querySelectorAll(".query")];
  const SVG = "http://www.w3.org/2000/svg";
  const SIZE = 100;
  const GAP = 24;

  function draw(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const named = (item) => item.class || item.title;
  const press = (all, chosen) => all.forEach((button) => button.setAttribute("aria-pressed", String(button === chosen)));
  const verdict = (right) => (right === null ? "" : right ? "same class" : "other class");

  function patch(index, offset) {
    const left = (index % side) * cell * SIZE;
    const top = Math.floor(index / side) * cell * SIZE;
    // the last patches of a Swin may reach beyond the image
    return { x: offset + left, y: top, width: Math.min(cell * SIZE, SIZE - left), height: Math.min(cell * SIZE, SIZE - top) };
  }

  function showMatches(query, near, source) {
    const whole = 2 * SIZE + GAP;
    const svg = draw("svg", { viewBox: `0 0 ${whole} ${SIZE}`, role: "img" });
    svg.setAttribute("aria-label", `${named(query)} beside ${named(near)}, with ${near.matches.length} pairs of matching patches`);
    svg.append(draw("image", { href: source, width: SIZE, height: SIZE }));
    svg.append(draw("image", { href: images[near.row], x: SIZE + GAP, width: SIZE, height: SIZE }));
    const boxes = near.matches.map((pair) => [patch(pair.query, 0), patch(pair.neighbour, SIZE + GAP)]);
    boxes.forEach(([a, b], i) => {
      const ends = { x1: a.x + a.width / 2, y1: a.y + a.height / 2, x2: b.x + b.width / 2, y2: b.y + b.height / 2 };
      svg.append(draw("line", { ...ends, class: "halo" }), draw("line", { ...ends, class: `m${i}` }));
    });
    boxes.forEach((pair, i) =>
      pair.forEach((box) => {
        svg.append(draw("rect", { ...box, class: "halo" }), draw("rect", { ...box, class: `m${i}` }));
        svg.append(draw("rect", { x: box.x, y: box.y, width: 6.5, height: 7.5, class: `tag m${i}` }));
        svg.append(draw("text", { x: box.x + 3.25, y: box.y + 5.8, "text-anchor": "middle" }, i + 1));
      }),
    );
    match.replaceChildren(svg);
    const place = (index) => `row ${Math.floor(index / side) + 1}, column ${(index % side) + 1}`;
    list.replaceChildren(
      ...near.matches.map((pair, i) =>
        element(
          "li",
          {},
          element("i", { class: `chip m${i}`, "aria-hidden": "true" }, String(i + 1)),
          ` cosine ${pair.cosine.toFixed(2)}, ${(100 * pair.share).toFixed(0)} % of the similarity`,
          element("span", { class: "small" }, ` ${place(pair.query)} with ${place(pair.neighbour)}`),
        ),
      ),
    );
    if (!near.matches.length) list.replaceChildren(element("li", {}, "No two patches point in a similar direction."));
  }

  function showQuery(index) {
    const query = queries[index];
    const source = buttons[index].querySelector("img").src;
    press(buttons, buttons[index]);
    const found = query.neighbours.map((near) => {
      const words = [near.similarity.toFixed(3), verdict(near.right)].filter(Boolean).join(", ");
      const button = element("button", { type: "button", class: `neighbour ${near.right === null ? "" : near.right ? "right" : "wrong"}`, "aria-pressed": "false" });
      button.append(
        element("img", { src: images[near.row], alt: "", width: 160, height: 160 }),
        element("span", { class: "name" }, breakable(named(near))),
        element("span", { class: "small" }, words),
      );
      button.addEventListener("click", () => {
        press(found, button);
        showMatches(query, near, source);
        say(query, near);
      });
      return button;
    });
    neighbours.replaceChildren(...found);
    match.replaceChildren();
    list.replaceChildren();
    if (!found.length) status.textContent = `${named(query)}: there is no other image.`;
    else found[0].click();
  }

  function say(query, near) {
    const right = query.neighbours.filter((other) => other.right).length;
    const of = query.neighbours[0].right === null ? "" : ` ${right} of ${query.neighbours.length} neighbours have its class.`;
    status.replaceChildren(
      element("b", {}, breakable(named(query))),
      query.class ? ` (${query.title}).` : ".",
      of,
      ` Shown beside `,
      element("b", {}, breakable(named(near))),
      `: cosine ${near.similarity.toFixed(3)}.`,
    );
  }

  buttons.forEach((button, index) => button.addEventListener("click", () => showQuery(index)));
  if (queries.length) showQuery(0);
})();
