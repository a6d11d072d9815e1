// npm run bench -- [options]: imgpull beside other programs that pull an image into a file, on this
// machine.
//
//   --line NAME|all                 default all: a table of all lines, each with imgpull beside the least time that the
//                                   line allows, -j 1, and crane where one connection ends within a minute;
//                                   one of LINES below: a table of programs
//   --image typical|many|big|one|all  default all
//   --runs N                        default 5, after a warm-up; the table has their medians
//   --node PATH                     a Node to run imgpull with, may be repeated; default the one that runs this
//   --script PATH                   a build of the command, may be repeated; default dist/imgpull.cjs
//   --only NAME,NAME                imgpull, crane, skopeo, regctl, oras, imgpull-go, docker; and
//                                   alone, which is imgpull -j 1 in the table of all lines
//   --tls                           over TLS, its authority known to all by SSL_CERT_FILE
//
// Tables go to stdout, each run to stderr. Programs take turns, each into a fresh file. On loopback
// they talk to the registry without a proxy, which would take its share of the processor. Requests
// and connections are the registry's own count; so are bytes, but on the far line, where they are
// those that came through it. CPU seconds and peak memory are GNU time's. docker's daemon unpacks
// the layers, and `docker save` packs them anew; oras writes a folder, not a tar.

import { execFileSync, fork, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import {
  accessSync,
  closeSync,
  constants,
  createWriteStream,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer } from "node:net";
import { cpus, totalmem } from "node:os";
import { basename, delimiter, dirname, join, resolve } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as pause } from "node:timers/promises";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { createGzip } from "node:zlib";
import { build } from "esbuild";

const MB = 1e6;
const LAYERS_MB = {
  typical: [15, 25, 36, 50, 60],
  many: Array(30).fill(2),
  big: [1000],
  one: [60],
};
/**
 * Rates are a connection's, and of all together; without one of a connection's own it can fill the
 * line.
 */
const LINES = {
  "near throttled": { roundTripMs: 2, bytesPerSecond: 8 * MB },
  far: { roundTripMs: 40, bytesPerSecond: 10 * MB },
  ocean: { roundTripMs: 150, bytesPerSecond: 2 * MB },
  office: { roundTripMs: 10, totalBytesPerSecond: 20 * MB },
  "far office": { roundTripMs: 60, totalBytesPerSecond: 20 * MB },
  region: { roundTripMs: 2, bytesPerSecond: 50 * MB, totalBytesPerSecond: 100 * MB },
  satellite: { roundTripMs: 600, bytesPerSecond: MB, totalBytesPerSecond: 10 * MB },
  loopback: undefined,
};
/** What `--line all` measures. */
const ROWS = [
  ["near throttled", "typical"],
  ["near throttled", "one"],
  ["far", "typical"],
  ["far", "many"],
  ["far", "one"],
  ["ocean", "typical"],
  ["ocean", "one"],
  ["office", "typical"],
  ["office", "many"],
  ["office", "one"],
  ["far office", "one"],
  ["region", "typical"],
  ["satellite", "one"],
  ["loopback", "typical"],
  ["loopback", "big"],
];
/**
 * The least time: 16 connections at once, and four round trips (a connection, index, manifest,
 * first byte).
 */
function leastSeconds(line, image) {
  const shape = LINES[line];
  if (!shape) return undefined;
  const { roundTripMs, bytesPerSecond = Infinity, totalBytesPerSecond = Infinity } = shape;
  const bytes = LAYERS_MB[image].reduce((sum, mb) => sum + mb * MB, 0);
  return bytes / Math.min(16 * bytesPerSecond, totalBytesPerSecond) + (4 * roundTripMs) / 1000;
}
const TIME = "/usr/bin/time";

// ====== The line ======
// Runs in a process of its own: what it takes of the processor is the same for all, and on no
// program's account.

/** What all connections share: each chunk takes its time, in the order in which they come. */
function sharedLine(bytesPerSecond = Infinity) {
  let freeAtMs = 0;
  return (sizeBytes) => {
    freeAtMs = Math.max(freeAtMs, performance.now()) + (sizeBytes * 1000) / bytesPerSecond;
    return freeAtMs;
  };
}

/** One way of a connection: what goes in comes out later, and not faster than the rate. */
function relay(from, to, { delayMs, bytesPerSecond, take }, openedAtMs, onBytes) {
  const windowBytes = Math.max(256 * 1024, (4 * delayMs * bytesPerSecond) / 1000); // twice what a round trip carries
  const underWay = [];
  let [bytesUnderWay, freeAtMs, isWaiting] = [0, openedAtMs, false];
  const send = () => {
    while (!isWaiting && underWay.length > 0) {
      const { dueAtMs, chunk } = underWay[0];
      const leftMs = dueAtMs - performance.now();
      if (leftMs > 0) return void setTimeout(send, leftMs);
      underWay.shift();
      if (!chunk) return void to.end();
      onBytes(chunk.length);
      bytesUnderWay -= chunk.length;
      if (bytesUnderWay < windowBytes) from.resume();
      if (to.write(chunk)) continue;
      isWaiting = true;
      to.once("drain", () => {
        isWaiting = false;
        send();
      });
    }
  };
  const add = (chunk) => {
    freeAtMs =
      Math.max(freeAtMs, performance.now()) + ((chunk?.length ?? 0) * 1000) / bytesPerSecond;
    if (chunk) freeAtMs = Math.max(freeAtMs, take(chunk.length));
    underWay.push({ dueAtMs: freeAtMs + delayMs, chunk });
    bytesUnderWay += chunk?.length ?? 0;
    if (bytesUnderWay >= windowBytes) from.pause();
    if (underWay.length === 1 && !isWaiting) send();
  };
  from.on("data", add).on("end", () => add());
  from.on("error", () => to.destroy()).on("close", () => from.readableEnded || to.destroy());
}

async function runLine({ port, roundTripMs, totalBytesPerSecond, ...shape }) {
  const { bytesPerSecond = totalBytesPerSecond } = shape;
  let bytes = 0;
  const up = sharedLine(totalBytesPerSecond);
  const down = sharedLine(totalBytesPerSecond);
  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    const registry = connect({ port, host: "127.0.0.1", allowHalfOpen: true, noDelay: true });
    const oneWay = { delayMs: roundTripMs / 2, bytesPerSecond };
    // The kernel has taken the connection at once; over a line that costs a round trip.
    const openedAtMs = performance.now() + roundTripMs;
    relay(client, registry, { ...oneWay, take: up }, openedAtMs, () => undefined);
    relay(registry, client, { ...oneWay, take: down }, 0, (count) => (bytes += count));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  process.on("message", () => {
    process.send({ bytes });
    bytes = 0;
  });
  process.on("disconnect", () => process.exit());
  process.send({ port: server.address().port });
}

async function startLine(port, shape) {
  const child = fork(fileURLToPath(import.meta.url), [
    "--shape",
    JSON.stringify({ port, ...shape }),
  ]);
  const [started] = await once(child, "message");
  const takeBytes = async () => {
    child.send("bytes");
    return (await once(child, "message"))[0].bytes;
  };
  return { port: started.port, takeBytes, stop: () => child.disconnect() };
}

// ====== Images ======
// Put where the registry's file system driver has them (distribution, registry/storage/paths.go),
// which is quicker than pushing. Layers are valid, so that docker can unpack them, and no
// compression makes them smaller.

const GO_ARCHITECTURES = { x64: "amd64", ia32: "386" };
const platform = { os: "linux", architecture: GO_ARCHITECTURES[process.arch] ?? process.arch };

function imageStore(storage, { pseudoRandom, writeTar }) {
  const root = join(storage, "docker/registry/v2");
  const write = (path, content) => {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), content);
  };
  const blobPath = (hex) => `blobs/sha256/${hex.slice(0, 2)}/${hex}/data`;

  const addLayer = async (seed, sizeMb) => {
    const [plain, packed] = [createHash("sha256"), createHash("sha256")];
    const incoming = join(storage, "incoming");
    async function* tar() {
      for (let at = 0; at < sizeMb; at += 1) {
        const piece = writeTar([[`${seed}-${at}`, pseudoRandom(`${seed} ${at}`, MB)]]);
        const bytes = at + 1 < sizeMb ? piece.subarray(0, -1024) : piece; // only the last has the end of the archive
        plain.update(bytes);
        yield bytes;
      }
    }
    async function* hashed(chunks) {
      for await (const chunk of chunks) {
        packed.update(chunk);
        yield chunk;
      }
    }
    const gzip = createGzip({ level: 0, chunkSize: MB });
    await pipeline(Readable.from(tar()), gzip, hashed, createWriteStream(incoming));
    const [hex, diffId] = [packed.digest("hex"), `sha256:${plain.digest("hex")}`];
    const { size } = statSync(incoming);
    write(blobPath(hex), "");
    renameSync(incoming, join(root, blobPath(hex)));
    return {
      diffId,
      mediaType: "application/vnd.oci.image.layer.v1.tar+gzip",
      digest: `sha256:${hex}`,
      size,
    };
  };
  const addJson = (mediaType, value) => {
    const bytes = Buffer.from(JSON.stringify(value));
    const hex = createHash("sha256").update(bytes).digest("hex");
    write(blobPath(hex), bytes);
    return { mediaType, digest: `sha256:${hex}`, size: bytes.length };
  };
  const link = (folder, { digest }) => write(`${folder}/${digest.replace(":", "/")}/link`, digest);

  /** One platform of an index, as public images are. */
  return async (name, sizesMb) => {
    mkdirSync(storage, { recursive: true });
    const layers = [];
    for (const [at, sizeMb] of sizesMb.entries())
      layers.push(await addLayer(`${name}-${at}`, sizeMb));
    const rootfs = { type: "layers", diff_ids: layers.map(({ diffId }) => diffId) };
    const history = layers.map(({ diffId }) => ({ created_by: diffId }));
    const config = addJson("application/vnd.oci.image.config.v1+json", {
      ...platform,
      config: {},
      rootfs,
      history,
    });
    const blobs = layers.map(({ diffId, ...descriptor }) => descriptor);
    const mediaType = "application/vnd.oci.image.manifest.v1+json";
    const manifest = addJson(mediaType, { schemaVersion: 2, mediaType, config, layers: blobs });
    const indexType = "application/vnd.oci.image.index.v1+json";
    const entries = [{ ...manifest, platform }];
    const index = addJson(indexType, {
      schemaVersion: 2,
      mediaType: indexType,
      manifests: entries,
    });
    const repository = `repositories/${name}`;
    for (const blob of [config, ...blobs]) link(`${repository}/_layers`, blob);
    for (const each of [manifest, index]) link(`${repository}/_manifests/revisions`, each);
    write(`${repository}/_manifests/tags/1/current/link`, index.digest);
    link(`${repository}/_manifests/tags/1/index`, index);
  };
}

// ====== Programs ======

function findProgram(name) {
  const isExecutable = (file) => {
    try {
      accessSync(file, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  };
  return (process.env.PATH ?? "")
    .split(delimiter)
    .map((folder) => join(folder, name))
    .find(isExecutable);
}

/** Each with the command that pulls `image` (HOST/NAME:TAG) into the new folder `folder`. */
function listPrograms({ node: nodes, script: scripts, only: names }) {
  const only = names.split(",");
  const word = `${platform.os}/${platform.architecture}`;
  const binaries = existsSync("dist/bin")
    ? readdirSync("dist/bin").map((name) => resolve("dist/bin", name))
    : [];
  const ours =
    (...start) =>
    ({ image, folder, isTls, more = [] }) => [
      ...start,
      image,
      join(folder, "image.tar"),
      ...(isTls ? [] : ["--scheme", "http"]),
      ...more,
    ];
  const nodeVersion = (node) =>
    execFileSync(node, ["--version"], { encoding: "utf8" }).trim().slice(1);
  const others = {
    crane: ({ image, folder }) => ["pull", image, join(folder, "image.tar")],
    skopeo: ({ image, folder, isTls }) => [
      "--insecure-policy",
      "copy",
      `--src-tls-verify=${isTls}`,
      `docker://${image}`,
      `oci-archive:${folder}/image.tar`,
    ],
    regctl: ({ image, folder, host, isTls }) => [
      "image",
      "export",
      ...(isTls ? [] : ["--host", `reg=${host},tls=disabled`]),
      image,
      join(folder, "image.tar"),
    ],
    oras: ({ image, folder, isTls }) => [
      "cp",
      "--no-tty",
      "--platform",
      word,
      ...(isTls ? [] : ["--from-plain-http"]),
      image,
      "--to-oci-layout",
      `${folder}:1`,
    ],
    "imgpull-go": ({ image, folder, isTls }) => [
      image,
      join(folder, "image.tar"),
      ...(isTls ? [] : ["--scheme", "http"]),
    ],
  };
  const docker = ({ image, folder }) => [
    "sh",
    "-c",
    'docker pull -q "$1" && exec docker save -o "$2" "$1"',
    "sh",
    image,
    join(folder, "image.tar"),
  ];
  const isRoot = process.getuid?.() === 0; // for the daemons
  const all = [
    ...scripts.flatMap((script) =>
      nodes.map((node) => {
        const build = scripts.length > 1 ? ` (${basename(script)})` : "";
        return {
          kind: "imgpull",
          name: `imgpull${build}, Node ${nodeVersion(node)}`,
          command: ours(node, resolve(script)),
        };
      }),
    ),
    ...binaries.map((file) => ({ kind: "imgpull", name: `imgpull, binary`, command: ours(file) })),
    ...Object.entries(others).map(([name, args]) => {
      const found = findProgram(name);
      return { kind: name, name, isMissing: !found, command: (target) => [found, ...args(target)] };
    }),
    {
      kind: "docker",
      name: "docker pull, save",
      isMissing: !isRoot || !["docker", "dockerd", "containerd"].every(findProgram),
      command: docker,
    },
  ];
  const wanted = all.filter(({ kind }) => only.includes(kind));
  const missing = wanted.filter(({ isMissing }) => isMissing).map(({ name }) => name);
  if (missing.length > 0) console.error(`not here: ${missing.join(", ")}`);
  return wanted.filter(({ isMissing }) => !isMissing);
}

/** dockerd with the storage driver of its choice, for pulling only. */
async function startDocker({ Service, startContainerd, interopFolder }) {
  const containerd = await startContainerd();
  const folder = interopFolder("docker");
  const host = `unix://${join(folder, "docker.sock")}`;
  mkdirSync(join(folder, "client"));
  writeFileSync(join(folder, "daemon.json"), "{}");
  const daemon = new Service({
    name: "dockerd",
    folder,
    ready: /API listen on/,
    stopSignal: "SIGTERM",
    command: [
      "dockerd",
      "--config-file",
      join(folder, "daemon.json"),
      "--host",
      host,
      "--containerd",
      containerd.address,
      "--data-root",
      join(folder, "data"),
      "--exec-root",
      join(folder, "exec"),
      "--pidfile",
      join(folder, "pid"),
      "--bridge",
      "none",
      "--iptables=false",
      "--ip6tables=false",
    ],
  });
  await daemon.start();
  const environment = { DOCKER_HOST: host, DOCKER_CONFIG: join(folder, "client") };
  const stop = async () => {
    await daemon.stop();
    await containerd.stop();
  };
  return { environment, stop };
}

// ====== Measuring ======

let running;
const hasTime = spawnSync(TIME, ["-f", "%M", "true"], { stdio: "ignore" }).status === 0;

/** Runs a command to its end in a process group of its own, which a signal to this process ends. */
async function measure(command, folder, environment) {
  const [log, usage] = [join(folder, "log"), join(folder, "usage")];
  const output = openSync(log, "w");
  const [program, ...args] = hasTime ? [TIME, "-f", "%U %S %M", "-o", usage, ...command] : command;
  const startedAt = performance.now();
  running = spawn(program, args, {
    stdio: ["ignore", output, output],
    env: environment,
    cwd: folder,
    detached: true,
  });
  const [code] = await once(running, "exit");
  const seconds = (performance.now() - startedAt) / 1000;
  running = undefined;
  closeSync(output);
  if (code !== 0)
    throw new Error(`${command.join(" ")}\n${readFileSync(log, "utf8").slice(-2000)}`);
  if (!hasTime) return { seconds };
  const [user, system, peakKib] = readFileSync(usage, "utf8").trim().split(/\s+/).map(Number);
  return { seconds, cpuSeconds: user + system, peakMib: peakKib / 1024 };
}

/** What the registry says that it was asked in a part of its log, and what it wrote. */
function countRequests(log) {
  const answers = [
    ...log.matchAll(
      /msg="response completed.* http\.request\.remoteaddr="([^"]+)".* http\.response\.written=(\d+)/g,
    ),
  ];
  const bytes = answers.reduce((sum, [, , written]) => sum + Number(written), 0);
  return {
    requests: answers.length,
    connections: new Set(answers.map(([, address]) => address)).size,
    bytes,
  };
}

function median(values) {
  const sorted = values.filter((value) => value !== undefined).sort((left, right) => left - right);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function table(results) {
  const medianOf = (runs, name) => median(runs.map((run) => run[name]));
  const crane = results.get("crane");
  const show = (value, digits) => (Number.isNaN(value ?? NaN) ? "–" : value.toFixed(digits));
  const rows = [...results].map(([name, runs]) => [
    name,
    show(medianOf(runs, "seconds"), 2),
    show(medianOf(runs, "seconds") / (crane ? medianOf(crane, "seconds") : NaN), 2),
    show(medianOf(runs, "bytes") / MB, 1),
    show(medianOf(runs, "requests"), 0),
    show(medianOf(runs, "connections"), 0),
    show(medianOf(runs, "cpuSeconds"), 2),
    show(medianOf(runs, "peakMib"), 0),
  ]);
  const head = [
    "program",
    "seconds",
    "× crane",
    "MB",
    "requests",
    "connections",
    "CPU s",
    "peak MiB",
  ];
  return [head, ["---", ...head.slice(1).map(() => "---:")], ...rows].map(tableRow).join("\n");
}

async function measureAll(programs, context) {
  const { image, line, registry, runs, folder, environments, isTls, hasWarmUp = true } = context;
  const shaper = LINES[line] && (await startLine(registry.port, LINES[line]));
  const host = `127.0.0.1:${shaper?.port ?? registry.port}`;
  const target = { host, image: `${host}/${image}:1`, folder, isTls };
  const results = new Map(programs.map(({ name }) => [name, []]));
  for (let run = hasWarmUp ? 0 : 1; run <= runs; run += 1) {
    for (const { kind, name, command } of programs) {
      if (!results.has(name)) continue;
      mkdirSync(folder);
      const before = registry.log().length;
      const environment = environments[kind] ?? environments.all;
      try {
        const measured = await measure(command(target), folder, environment);
        const used = kind === "docker" ? { seconds: measured.seconds } : measured; // its daemon does the work
        await pause(50); // the registry writes about an answer after it, and the line may still hold some of it
        const counts = countRequests(registry.log().slice(before));
        const result = { ...used, ...counts, ...(shaper && { bytes: await shaper.takeBytes() }) };
        if (run > 0) results.get(name).push(result);
        console.error(
          `${image} ${line} ${run || "warm-up"}: ${name} ${result.seconds.toFixed(2)} s`,
        );
      } catch (failure) {
        results.delete(name);
        console.error(`${name} failed and is left out: ${failure.message}`);
      }
      if (kind === "docker")
        spawnSync("docker", ["rmi", "-f", target.image], { env: environment, stdio: "ignore" });
      rmSync(folder, { recursive: true });
    }
  }
  shaper?.stop();
  return results;
}

/**
 * A line's row: each imgpull, the same over one connection, and crane where that ends within a
 * minute. Where the line is what they wait for, once is enough for those two.
 */
async function measureRow(programs, context) {
  const { line, image, only } = context;
  const least = leastSeconds(line, image);
  const { bytesPerSecond, totalBytesPerSecond } = LINES[line] ?? {};
  const megabytes = LAYERS_MB[image].reduce((sum, mb) => sum + mb, 0);
  const aloneSeconds = (megabytes * MB) / (bytesPerSecond ?? totalBytesPerSecond ?? Infinity);
  const ours = programs.filter(({ kind }) => kind === "imgpull");
  const [{ command }] = ours;
  const alone = { name: "-j 1", command: (target) => command({ ...target, more: ["-j", "1"] }) };
  const others = [
    ...(only.includes("alone") ? [alone] : []),
    ...programs.filter(({ kind }) => kind === "crane"),
  ];
  const isSlow = aloneSeconds > 4;
  const results = await measureAll([...ours, ...(isSlow ? [] : others)], context);
  if (isSlow && aloneSeconds < 60) {
    const slow = await measureAll(others, { ...context, runs: 1, hasWarmUp: false });
    for (const [name, runs] of slow) results.set(name, runs);
  }

  const of = (name, what) => median((results.get(name) ?? []).map((run) => run[what]));
  const show = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
  const our = ours.map(({ name }) => [
    show(of(name, "seconds"), 2),
    show(of(name, "seconds") / least, 2),
    show(of(name, "connections"), 0),
    show(of(name, "requests"), 0),
    show(of(name, "peakMib"), 0),
  ]);
  const theirs = ["-j 1", "crane"].map((name) => show(of(name, "seconds"), 2));
  return [
    `${line}${context.isTls ? ", TLS" : ""}`,
    image,
    show(least, 2),
    ...our.flat(),
    ...theirs,
  ];
}

const tableRow = (cells) => `| ${cells.join(" | ")} |`;

function lineTableHead(programs) {
  const ours = programs.filter(({ kind }) => kind === "imgpull").map(({ name }) => name);
  const columns = (name) => [name, "× limit", "connections", "requests", "peak MiB"];
  const head = ["line", "image", "limit, s", ...ours.flatMap(columns), "-j 1", "crane"];
  const rule = head.map((_, at) => (at < 2 ? "---" : "---:"));
  return [head, rule].map(tableRow).join("\n");
}

/** The tests' registry and certificates, bundled as build.mjs bundles a test. */
async function loadSupport() {
  const outfile = resolve("build/bench-support.mjs");
  const contents = ["interop", "certificates", "image"]
    .map((name) => `export * from "./${name}.ts";`)
    .join("\n");
  await build({
    stdin: { contents, resolveDir: "test/support", loader: "ts" },
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node20.19",
    logLevel: "warning",
    outfile,
  });
  return import(pathToFileURL(outfile).href);
}

function parseOptions() {
  const text = (initial) => ({ type: "string", default: initial });
  const { values } = parseArgs({
    options: {
      line: text("all"),
      image: text("all"),
      runs: text("5"),
      only: text("alone,imgpull,crane,skopeo,regctl,oras,imgpull-go,docker"),
      tls: { type: "boolean", default: false },
      node: { type: "string", multiple: true, default: [process.execPath] },
      script: { type: "string", multiple: true, default: ["dist/imgpull.cjs"] },
    },
  });
  const choose = (name, table) => {
    const names = Object.keys(table);
    if (values[name] !== "all" && !names.includes(values[name]))
      throw new Error(`--${name} is ${names.join(", ")} or all`);
    return values[name] === "all" ? names : [values[name]];
  };
  if (!/^[1-9]\d*$/.test(values.runs)) throw new Error("--runs is a whole number from 1 on");
  return {
    lines: choose("line", LINES),
    images: choose("image", LAYERS_MB),
    runs: Number(values.runs),
    isTls: values.tls,
    only: values.only.split(","),
    programs: listPrograms(values),
  };
}

async function main() {
  process.chdir(fileURLToPath(new URL("..", import.meta.url)));
  const { lines, images, runs, isTls, only, programs } = parseOptions();
  const support = await loadSupport();
  const { interopFolder, makeAuthority, startRealRegistry, toolEnvironment } = support;
  if (!hasTime) console.error("no GNU time here: CPU seconds and peak memory are left out");
  for (const signal of ["SIGINT", "SIGTERM"]) {
    process.once(signal, () => {
      if (running) process.kill(-running.pid, "SIGKILL");
      process.exit(1);
    });
  }
  const state = interopFolder("bench");
  const authority = isTls ? makeAuthority() : undefined;
  const storage = join(state, "storage");
  const addImage = imageStore(storage, support);
  for (const image of images) await addImage(image, LAYERS_MB[image]);
  const tls = authority && { tls: authority.issueServer() };
  const registry = await startRealRegistry({ storage, ...tls });
  const docker = programs.some(({ kind }) => kind === "docker")
    ? await startDocker(support)
    : undefined;
  const certificates = join(state, "authority.pem");
  if (authority) writeFileSync(certificates, authority.cert);
  const all = { ...toolEnvironment(), ...(authority && { SSL_CERT_FILE: certificates }) };
  const environments = { all, docker: { ...all, ...docker?.environment } };
  try {
    const [{ model }] = cpus();
    const machine = `${cpus().length} × ${model}, ${Math.round(totalmem() / 2 ** 30)} GiB, ${process.platform}`;
    console.log(
      `${new Date().toISOString().slice(0, 10)}, ${machine}; medians of ${runs}${isTls ? ", over TLS" : ""}`,
    );
    const common = { registry, runs, folder: join(state, "dest"), environments, isTls, only };
    if (lines.length > 1) {
      console.log(`\n${lineTableHead(programs)}`);
      for (const [line, image] of ROWS)
        if (images.includes(image))
          console.log(tableRow(await measureRow(programs, { ...common, line, image })));
      return;
    }
    for (const line of lines) {
      for (const image of images) {
        const context = { ...common, line, image };
        console.log(
          `\n${line}, ${image} (${LAYERS_MB[image].length} × ${LAYERS_MB[image].join(", ")} MB)\n`,
        );
        console.log(table(await measureAll(programs, context)));
      }
    }
  } finally {
    await docker?.stop();
    await registry.stop();
  }
}

if (process.argv[2] === "--shape") await runLine(JSON.parse(process.argv[3]));
else await main();
