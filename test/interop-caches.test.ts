// Caches that nobody here wrote, between us and a registry that is far: what they fetch is counted
// there. A blob that a cache has to fetch first is heard to its end by one plain GET.
import assert from "node:assert/strict";
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { describe, type TestContext, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import { makeMultiPlatform, type TestIndex } from "./support/image.ts";
import { imgpull, skipWithout, startNginx, startSquid } from "./support/interop.ts";
import { checkTar, childOf, serve } from "./support/pull.ts";
import type { Registry } from "./support/registry.ts";

const MB = 1e6;
const ONE = makeMultiPlatform(["linux/amd64"], { seed: "cache", layers: [20 * MB] });
const SEVERAL = makeMultiPlatform(["linux/amd64"], {
  seed: "caches",
  layers: [12 * MB, 6 * MB, 3 * MB],
});

/**
 * 30 ms to the first byte, and 6 MB/s for each connection. Blobs may be kept, as docker-registry
 * says.
 */
function putFarAway(registry: Registry): void {
  const msPerByte = 1000 / (6 * MB);
  registry.on(
    {},
    {
      handler: async (_request, response, next) => {
        await pause(30);
        response.setHeader("cache-control", "max-age=31536000");
        response.setHeader("date", new Date().toUTCString());
        const write = response.write.bind(response) as (chunk: Buffer) => boolean;
        response.write = ((chunk: Buffer) => {
          setTimeout(() => write(chunk) && response.emit("drain"), chunk.length * msPerByte);
          return false;
        }) as typeof response.write;
        const end = response.end.bind(response);
        response.end = (() => {
          setTimeout(() => end(), 65_536 * msPerByte + 1);
          return response;
        }) as typeof response.end;
        await next();
      },
    },
  );
}

async function serveFarAway(t: TestContext, content: TestIndex) {
  const served = await serve(t, content);
  putFarAway(served.registry);
  const imageBytes = [...childOf(content).blobs.values()].reduce(
    (sum, { length }) => sum + length,
    0,
  );
  return { ...served, imageBytes };
}

async function pullThrough(host: string, dest: string, folder: string): Promise<void> {
  const args = [
    "--scheme",
    "http",
    "--platform",
    "linux/amd64",
    "--name",
    "example.com/team/app:1.0",
  ];
  await imgpull([`${host}/team/app:1.0`, dest, ...args], { cwd: folder });
}

describe("nginx, whose cache is cold and without a lock", {
  skip: skipWithout("nginx"),
  timeout: 120_000,
}, () => {
  for (const [name, content] of [
    ["one layer", ONE],
    ["several layers", SEVERAL],
  ] as const) {
    test(name, async (t) => {
      const { registry, dest, folder, imageBytes } = await serveFarAway(t, content);
      const nginx = await startNginx({ upstream: registry.url, isCache: true });
      t.after(() => nginx.stop());
      await pullThrough(nginx.host, dest, folder);
      await registry.settled();
      const ratio = registry.bytesServed() / imageBytes;
      t.diagnostic(`${ratio.toFixed(3)} times the image`);
      assert.ok(ratio <= 1.2, `${ratio.toFixed(2)} times the image was fetched`);
      checkTar(readFileSync(dest), childOf(content));
    });
  }
});

describe("squid, which says that it had to fetch", {
  skip: skipWithout("squid"),
  timeout: 120_000,
}, () => {
  for (const [name, content] of [
    ["one layer", ONE],
    ["several layers", SEVERAL],
  ] as const) {
    test(`${name}: fetched once, and not at all by the next pull`, async (t) => {
      const { registry, dest, folder, imageBytes } = await serveFarAway(t, content);
      const squid = await startSquid({ cacheOf: Number(registry.host.split(":")[1]) });
      t.after(() => squid.stop());
      const host = `127.0.0.1:${squid.port}`;
      await pullThrough(host, dest, folder);
      await registry.settled();
      const before = registry.bytesServed();
      assert.equal(before, imageBytes);
      checkTar(readFileSync(dest), childOf(content));

      rmSync(dest);
      await pullThrough(host, join(folder, "again.tar"), folder);
      await registry.settled();
      assert.equal(registry.bytesServed(), before);
    });
  }
});
