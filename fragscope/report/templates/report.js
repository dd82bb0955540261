"use strict";
(() => {
  // A figure is zlib-compressed JSON in base64. Its colours are placeholders, #f0f1 and the number of a name.
  const names = document.body.dataset.colors.split(" ");
  const plots = new Map([...document.querySelectorAll(".plot")].map(
    (element) => [element, { payload: element.querySelector("script").textContent, drawn: null, hidden: new Set() }],
  ));

  async function unpack(payload) {
    const bytes = Uint8Array.from(atob(payload), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const text = await new Response(stream).text();
    const style = getComputedStyle(document.documentElement);
    return JSON.parse(text.replace(/#f0f1([0-9a-f]{2})/g, (_, n) => style.getPropertyValue("--" + names[parseInt(n, 16)]).trim()));
  }

  // One after the other: the page stays responsive, and the newest document is the one just made.
  let queue = Promise.resolve();
  function draw(element) {
    const plot = plots.get(element);
    if (plot.drawn) return;
    plot.drawn = "soon";
    queue = queue.then(async () => {
      const item = await unpack(plot.payload);
      element.replaceChildren();
      await Bokeh.embed.embed_item(item, element);
      plot.drawn = Bokeh.documents.at(-1);
      show(plot);
      element.dataset.drawn = "yes";
    }).catch((error) => {
      element.textContent = "This figure could not be drawn; its numbers are in the text.";
      console.error(error);
    });
  }

  function show(plot) {
    for (const root of plot.drawn.roots()) {
      for (const part of [...root.renderers, ...root.center]) {
        if (part.tags && part.tags.length) part.visible = !plot.hidden.has(part.tags[0]);
      }
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "800px 0px" });
  for (const element of plots.keys()) seen.observe(element);

  for (const button of document.querySelectorAll(".keys button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const plot = plots.get(button.closest("figure").querySelector(".plot"));
      plot.hidden[on ? "delete" : "add"](button.dataset.letter);
      if (plot.drawn && plot.drawn !== "soon") show(plot);
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, plot] of plots) {
      if (!plot.drawn || plot.drawn === "soon") continue;
      plot.drawn.clear();
      plot.drawn = null;
      draw(element);
    }
  });
})();
