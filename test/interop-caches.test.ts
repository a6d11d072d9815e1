// Caches that nobody here wrote, between us and a registry that is far: what they fetch is counted
// there. A blob that a cache has to fetch first is heard to its end by one answer.
import assert from "node:assert/strict";
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { describe, type TestContext, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import { runCommand, startCommand } from "./support/command.ts";
import { makeMultiPlatform, type TestIndex } from "./support/image.ts";
import {
  imgpull,
  type RealRegistryOptions,
  skipWithout,
  startNginx,
  startRealRegistry,
  startSquid,
} from "./support/interop.ts";
import { startApache, startTrafficServer, startVarnish } from "./support/interop-caches.ts";
import { checkTar, childOf, serve } from "./support/pull.ts";
import type { Fault, Matcher, Registry } from "./support/registry.ts";

const MB = 1e6;
const ONE = makeMultiPlatform(["linux/amd64"], { seed: "cache", layers: [16 * MB] });
const SEVERAL = makeMultiPlatform(["linux/amd64"], {
  seed: "caches",
  layers: [12 * MB, 6 * MB, 3 * MB],
});
const GAPPY = makeMultiPlatform(["linux/amd64"], { seed: "gaps", layers: [24 * MB] });
const GAPPIER = makeMultiPlatform(["linux/amd64"], {
  seed: "more gaps",
  layers: [14 * MB, 10 * MB],
});

/**
 * 60 ms to the first byte, so that no machine is too busy to be told from a far one, and 6 MB/s for
 * each connection. Blobs may be kept, as docker-registry says.
 */
function putFarAway(registry: Registry, matcher: Matcher = {}, fault: Fault = {}): void {
  const msPerByte = 1000 / (6 * MB);
  registry.on(matcher, {
    ...fault,
    handler: async (_request, response, next) => {
      await pause(60);
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
  });
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

const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64"];
const NAMED = [...OPTIONS, "--name", "example.com/team/app:1.0"];

async function pullThrough(host: string, dest: string, folder: string): Promise<void> {
  await imgpull([`${host}/team/app:1.0`, dest, ...NAMED], { cwd: folder });
}

// ====== Kinds of caches ======

interface Cache {
  host: string;
  stop: () => Promise<void>;
}

interface Kind {
  name: string;
  programs: string[];
  start: (registry: Registry) => Promise<Cache>;
  contents: TestIndex[];
  /** How often the image may be fetched by the first pull, and by the next one; default 0. */
  atMost: number;
  again?: number;
}

const portOf = ({ host }: Registry): number => Number(host.split(":")[1]);

const startNginxCache = ({ url }: Registry, cacheSettings = ""): Promise<Cache> =>
  startNginx({ upstream: url, isCache: true, cacheSettings });

async function startSquidCache(registry: Registry): Promise<Cache> {
  const squid = await startSquid({ cacheOf: portOf(registry) });
  return { host: `127.0.0.1:${squid.port}`, stop: () => squid.stop() };
}

/** distribution's own pull-through cache. */
const startPullThrough =
  (program: NonNullable<RealRegistryOptions["program"]>) =>
  ({ url }: Registry): Promise<Cache> =>
    startRealRegistry({ program, configuration: { proxy: { remoteurl: url } } });

const SLICES = `slice 1m;
      proxy_cache_key $uri$slice_range;
      proxy_set_header Range $slice_range;
      proxy_cache_valid 200 206 1h;`;

const KINDS: Kind[] = [
  {
    name: "nginx, without a lock",
    programs: ["nginx"],
    start: (registry) => startNginxCache(registry),
    contents: [ONE, SEVERAL],
    atMost: 1,
  },
  {
    name: "nginx, with a lock",
    programs: ["nginx"],
    start: (registry) => startNginxCache(registry, "proxy_cache_lock on;"),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "nginx, which says whether it had to fetch",
    programs: ["nginx"],
    start: (registry) =>
      startNginxCache(registry, "add_header X-Cache-Status $upstream_cache_status;"),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "nginx, in slices",
    programs: ["nginx"],
    start: (registry) => startNginxCache(registry, SLICES),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "squid, which says that it had to fetch, and keeps no ranges",
    programs: ["squid"],
    start: startSquidCache,
    contents: [ONE, SEVERAL],
    atMost: 1,
  },
  {
    name: "Varnish, which lets ranges wait for what it fetches",
    programs: ["varnishd"],
    start: (registry) => startVarnish(portOf(registry)),
    contents: [ONE, SEVERAL],
    atMost: 1,
  },
  {
    name: "Varnish, which does not say whether it had to fetch",
    programs: ["varnishd"],
    start: (registry) =>
      startVarnish(portOf(registry), { delivered: "unset resp.http.X-Varnish;" }),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "Varnish, which answers when it has all",
    programs: ["varnishd"],
    start: (registry) =>
      startVarnish(portOf(registry), { fetched: "set beresp.do_stream = false;" }),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "Varnish, which may not keep what it fetches, and fetches the whole for each range",
    programs: ["varnishd"],
    start: (registry) =>
      startVarnish(portOf(registry), { fetched: "set beresp.uncacheable = true;" }),
    contents: [ONE],
    atMost: 1,
    again: 1,
  },
  {
    name: "Apache's mod_cache, which keeps no ranges",
    programs: ["apache2"],
    start: (registry) => startApache(portOf(registry)),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "Traffic Server, which keeps no ranges and does not say so",
    programs: ["traffic_server"],
    start: (registry) => startTrafficServer(portOf(registry)),
    contents: [ONE],
    atMost: 1,
  },
  {
    name: "distribution 3",
    programs: ["registry"],
    start: startPullThrough("registry"),
    contents: [ONE, SEVERAL],
    atMost: 1,
  },
  {
    // It fetches what is new twice by itself: for who asked, and for its storage.
    name: "distribution 2.8",
    programs: ["docker-registry"],
    start: startPullThrough("docker-registry"),
    contents: [ONE],
    atMost: 2,
  },
];

for (const { name, programs, start, contents, atMost, again = 0 } of KINDS) {
  describe(name, { skip: skipWithout(...programs), timeout: 120_000 }, () => {
    for (const content of contents) {
      const count = content === ONE ? "one layer" : "several layers";
      test(`${count}: fetched ${atMost} times at most, and ${again} by the next pull`, async (t) => {
        const { registry, dest, folder, imageBytes } = await serveFarAway(t, content);
        const cache = await start(registry);
        t.after(() => cache.stop());
        await pullThrough(cache.host, dest, folder);
        await registry.settled();
        const before = registry.bytesServed();
        t.diagnostic(`${(before / imageBytes).toFixed(3)} times the image`);
        assert.ok(before <= atMost * imageBytes, `${before} bytes of ${imageBytes}`);
        checkTar(readFileSync(dest), childOf(content));

        rmSync(dest);
        await pullThrough(cache.host, join(folder, "again.tar"), folder);
        await registry.settled();
        assert.ok(registry.bytesServed() <= before + again * imageBytes);
      });
    }
  });
}

test("no cache, but a storage that the registry sends us to: ranges, and nothing asked for twice", async (t) => {
  const { registry, dest, folder } = await serve(t, ONE);
  putFarAway(registry, { kind: "blob" }, { redirect: "storage" });
  putFarAway(registry);
  await pullThrough(registry.host, dest, folder);
  const [config = ""] = childOf(ONE).configs;
  assert.equal(registry.storageRequests(config).length, 1);
  assert.ok(registry.seen({ kind: "storage", ranged: true }).length >= 2);
});

// ====== Onto stdout ======

const STREAMED: [name: string, program: string, start: Kind["start"]][] = [
  ["nginx, without a lock", "nginx", (registry) => startNginxCache(registry)],
  ["squid", "squid", startSquidCache],
];

for (const [name, program, start] of STREAMED) {
  test(`onto stdout through ${name}: one request for each layer, and the image once`, {
    skip: skipWithout(program),
    timeout: 120_000,
  }, async (t) => {
    const { registry, imageBytes } = await serveFarAway(t, SEVERAL);
    const cache = await start(registry);
    t.after(() => cache.stop());
    const { exitCode, stdout, stderr } = await runCommand([
      `${cache.host}/team/app:1.0`,
      "-",
      ...NAMED,
    ]);
    assert.equal(exitCode, 0, stderr);
    checkTar(stdout, childOf(SEVERAL));
    await registry.settled();
    assert.equal(registry.bytesServed(), imageBytes);
    assert.equal(registry.seen({ kind: "layer" }).length, 3);
  });
}

// ====== Going on ======

/** An image with gaps that a killed run has left, which pulled from the registry itself. */
async function leaveGaps(registry: Registry, dest: string, imageBytes: number): Promise<void> {
  const { child, result } = startCommand([`${registry.host}/team/app:1.0`, dest, "-j4", ...NAMED]);
  while (registry.bytesServed() < imageBytes / 2) await pause(5);
  child.kill("SIGKILL");
  const { signal } = await result;
  assert.equal(signal, "SIGKILL", "ended before its time");
  await registry.settled();
  assert.ok(registry.seen({ kind: "layer", ranged: true }).length >= 2, "nothing is out of order");
  registry.forget();
}

const RESUMED: [name: string, program: string, start: Kind["start"]][] = [
  ...STREAMED,
  [
    "Varnish, which does not say whether it had to fetch",
    "varnishd",
    (registry) => startVarnish(portOf(registry), { delivered: "unset resp.http.X-Varnish;" }),
  ],
  ["distribution 3", "registry", startPullThrough("registry")],
];

const GOING_ON = RESUMED.flatMap((through) => [
  [...through, GAPPY, "one layer"] as const,
  [...through, GAPPIER, "two layers"] as const,
]);

for (const [name, program, start, content, count] of GOING_ON) {
  test(`going on through ${name}, which has nothing yet, ${count}: the image is fetched once at most`, {
    skip: skipWithout(program),
    timeout: 120_000,
  }, async (t) => {
    const { registry, dest, folder, imageBytes } = await serveFarAway(t, content);
    await leaveGaps(registry, dest, imageBytes);
    const cache = await start(registry);
    t.after(() => cache.stop());
    await pullThrough(cache.host, dest, folder);
    await registry.settled();
    t.diagnostic(`${(registry.bytesServed() / imageBytes).toFixed(3)} times the image`);
    assert.ok(registry.bytesServed() <= imageBytes);
    checkTar(readFileSync(dest), childOf(content));
  });
}
