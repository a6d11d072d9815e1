import { test } from "node:test";
import { makeImage } from "./support/image.ts";
import { startRegistry } from "./support/registry.ts";
import { pull, assertPulled } from "./support/session.ts";
test("x", async (t) => {
  const registry = await startRegistry({ auth: { mode: "bearer" } }, t);
  const image = makeImage();
  const outcome = await pull(t, registry.add(image, "team/app", "1.0"), { scheme: "http" });
  assertPulled(outcome, image);
  console.log(outcome, registry.requests.map((r) => `${r.method} ${r.url} ${r.status}`));
});
