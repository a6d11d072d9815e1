// listTar(), verifyTar() and openTar() as their user writes them: paths, folders and streams;
// problems as values.
import assert from "node:assert/strict";
import { createReadStream, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Readable } from "node:stream";
import { test } from "node:test";
import { gzipSync } from "node:zlib";
import {
  ImgpullError,
  listTar,
  openTar,
  pullImages,
  type TarSource,
  verifyTar,
} from "../imgpull.ts";
import { FIRST, IMAGES, serveBundle } from "./support/bundle.ts";
import { cleanEnvironment } from "./support/command.ts";
import { digestOf } from "./support/image.ts";
import { blobsOf, failure } from "./support/pull.ts";

process.env = cleanEnvironment();

const AMD64 = { scheme: "http", platforms: ["linux/amd64"] } as const;
const [FIRST_IMAGE, SECOND_IMAGE] = IMAGES as [(typeof IMAGES)[0], (typeof IMAGES)[0]];

type Scope = Parameters<typeof serveBundle>[0];

/** A tar with two images, and a folder with the same. */
async function pulled(t: Scope): Promise<{ tar: string; layout: string; references: string[] }> {
  const { references, folder } = await serveBundle(t);
  const two = references.slice(0, 2);
  const tar = join(folder, "b.tar");
  const layout = join(mkdtempSync(join(folder, "layout-")), "/");
  await pullImages(two, tar, AMD64);
  await pullImages(two, layout, AMD64);
  return { tar, layout, references: two };
}

/** One bit of what is in a tar is another. */
function flip(tar: Buffer, content: Buffer): void {
  const at = tar.indexOf(content) + 9;
  tar.writeUInt8(tar.readUInt8(at) ^ 1, at);
}

/** The same bytes as a consumer may have them, in pieces that fit nothing. */
async function* piecesOf(bytes: Buffer): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += 777) yield new Uint8Array(bytes.subarray(at, at + 777));
}

const SOURCES: Record<string, (tar: string, layout: string) => TarSource> = {
  "a path": (tar) => tar,
  "a folder": (_tar, layout) => layout,
  "a Readable": (tar) => createReadStream(tar),
  "a Readable that is compressed": (tar) => Readable.from([gzipSync(readFileSync(tar))]),
  "an async generator of Uint8Arrays": (tar) => piecesOf(readFileSync(tar)),
};

for (const [name, sourceOf] of Object.entries(SOURCES)) {
  test(`${name}: listed, verified, and read`, async (t) => {
    const { tar, layout, references } = await pulled(t);
    const images = await listTar(sourceOf(tar, layout));
    assert.deepEqual(
      images.map((image) => [image.name, image.digest, image.platform, image.layers.length]),
      references.map((reference, at) => {
        const image = IMAGES[at] ?? assert.fail();
        return [reference, image.digest, "linux/amd64", image.layers.length];
      }),
    );

    const seen: number[] = [];
    const report = await verifyTar(sourceOf(tar, layout), {
      onProgress: ({ doneBytes }) => seen.push(doneBytes),
    });
    assert.deepEqual(report.images, images);
    assert.deepEqual(report.problems, []);
    const layers = new Set(
      [...FIRST_IMAGE.layers, ...SECOND_IMAGE.layers].map(({ digest }) => digest),
    );
    assert.equal(report.unpackedLayers, layers.size);
    const loaders = report.loaders.filter(({ takes }) => takes).map(({ program }) => program);
    const isFolder = name.includes("folder");
    const isPlain = !name.includes("compressed"); // ctr does not unpack a tar as a whole
    assert.equal(loaders.includes("ctr"), isPlain && !isFolder, loaders.join());
    const ofSkopeo = isFolder ? "skopeo oci" : "skopeo oci-archive";
    assert.ok(loaders.includes(ofSkopeo), loaders.join());
    assert.ok(seen.length > 0 && seen.every((bytes, at) => bytes >= (seen[at - 1] ?? 0)));

    const reader = await openTar(sourceOf(tar, layout));
    const digests: string[] = [];
    for await (const { name: file, sizeBytes, digest, content } of reader.files()) {
      const pieces: Uint8Array[] = [];
      for await (const piece of content()) pieces.push(piece);
      const bytes = Buffer.concat(pieces);
      assert.equal(bytes.length, sizeBytes, file);
      if (digest === undefined) continue;
      assert.equal(digestOf(bytes), digest);
      digests.push(digest);
    }
    const manifests = [FIRST_IMAGE.digest, SECOND_IMAGE.digest];
    assert.deepEqual(digests.sort(), [...blobsOf(FIRST_IMAGE, SECOND_IMAGE), ...manifests].sort());
    await reader.close();
  });
}

test("openTar: a blob by its digest, again and again of a file and once of a stream", async (t) => {
  const { tar, layout } = await pulled(t);
  const [layer] = FIRST_IMAGE.layers;
  assert.ok(layer);
  for (const source of [tar, layout, createReadStream(tar)]) {
    const reader = await openTar(source);
    const bytes = async (digest: string): Promise<Buffer> =>
      Buffer.concat(await Readable.from(reader.blob(digest)).toArray());
    assert.ok((await bytes(layer.digest)).equals(layer.bytes));
    if (typeof source === "string") {
      assert.ok((await bytes(layer.digest)).equals(layer.bytes));
      assert.ok((await bytes(FIRST_IMAGE.digest)).equals(FIRST_IMAGE.bytes));
    }
    const { code } = await failure(bytes(FIRST.digest));
    assert.equal(code, typeof source === "string" ? "NOT_FOUND" : "UNSUPPORTED");
    await reader.close();
  }

  const damaged = readFileSync(tar);
  flip(damaged, layer.bytes);
  writeFileSync(tar, damaged);
  const reader = await openTar(tar);
  const reading = (async () => {
    for await (const _piece of reader.blob(layer.digest));
  })();
  assert.equal((await failure(reading)).code, "DIGEST_MISMATCH");
  await reader.close();
});

test("verifyTar: BAD_TAR with each problem as a value, and what is right besides", async (t) => {
  const { tar } = await pulled(t);
  const bytes = readFileSync(tar);
  const [layer] = FIRST_IMAGE.layers;
  const { digest = "", bytes: content = Buffer.alloc(0) } = layer ?? {};
  flip(bytes, content);
  writeFileSync(tar, bytes);
  const error = await failure(verifyTar(tar));
  assert.equal(error.code, "BAD_TAR");
  const entry = `blobs/${digest.replace(":", "/")}`;
  assert.deepEqual(error.report?.problems, [{ kind: "damaged", entry }]);
  assert.equal(error.report?.images.length, 2);
  assert.match(error.message, new RegExp(`^\\S+b\\.tar: ${entry} is damaged$`));
});

test("what cannot be read at all: BAD_TAR or DISK; a signal's reason; a callback that throws", async (t) => {
  const { tar, layout } = await pulled(t);
  const folder = join(layout, "..");
  writeFileSync(join(folder, "text.txt"), "no tar".repeat(500));
  const files = readdirSync("/proc/self/fd").length;
  for (const look of [listTar, verifyTar]) {
    assert.equal((await failure(look(join(folder, "none.tar")))).code, "DISK");
    assert.equal((await failure(look(join(folder, "text.txt")))).code, "BAD_TAR");
    assert.equal((await failure(look(piecesOf(Buffer.alloc(0))))).code, "BAD_TAR");
    const reason = new Error("of the caller's own");
    for (const source of [tar, layout, createReadStream(tar)]) {
      const signal = AbortSignal.abort(reason);
      const error = await failure(look(source, { signal }));
      assert.deepEqual([error.code, error.cause], ["ABORTED", reason]);
    }
    const onProgress = () => {
      throw reason;
    };
    const outcome = await look(tar, { onProgress }).catch((error: unknown) => error);
    if (look === verifyTar) assert.equal(outcome, reason);
    await assert.rejects(look(tar, { onprogress: onProgress } as object), {
      code: "BAD_OPTION",
      message: /unknown option `onprogress`: did you mean `onProgress`\?/,
    });
    await assert.rejects(look("a\0b"), { name: "ImgpullError", code: "BAD_OPTION" });
    await assert.rejects(look(5 as unknown as string), {
      name: "ImgpullError",
      code: "BAD_OPTION",
    });
  }
  assert.ok(readdirSync("/proc/self/fd").length <= files + 1);
  assert.ok((await failure(verifyTar("no/such.tar"))) instanceof ImgpullError);
});

test("a callback whose promise rejects ends the look, and nothing is left unhandled", async (t) => {
  const { tar } = await pulled(t);
  const unhandled: unknown[] = [];
  const note = (reason: unknown) => unhandled.push(reason);
  process.on("unhandledRejection", note);
  t.after(() => process.off("unhandledRejection", note));
  const reason = new Error("of the caller's own");
  const onProgress = async () => Promise.reject(reason);
  await assert.rejects(verifyTar(tar, { onProgress }), (error) => error === reason);
  await new Promise(setImmediate);
  assert.deepEqual(unhandled, []);
});
