// Test images as plain data: deterministic bytes (seeded, no clock), real tars in real gzip or zstd
// frames, made without the module under test, so that tests compare it with something else.
import { createCipheriv, createHash } from "node:crypto";
import { crc32 } from "node:zlib";

export const MEDIA = {
  ociIndex: "application/vnd.oci.image.index.v1+json",
  ociManifest: "application/vnd.oci.image.manifest.v1+json",
  ociConfig: "application/vnd.oci.image.config.v1+json",
  ociTar: "application/vnd.oci.image.layer.v1.tar",
  ociGzip: "application/vnd.oci.image.layer.v1.tar+gzip",
  ociZstd: "application/vnd.oci.image.layer.v1.tar+zstd",
  ociForeign: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
  ociEmpty: "application/vnd.oci.empty.v1+json",
  dockerList: "application/vnd.docker.distribution.manifest.list.v2+json",
  dockerManifest: "application/vnd.docker.distribution.manifest.v2+json",
  dockerConfig: "application/vnd.docker.container.image.v1+json",
  dockerTar: "application/vnd.docker.image.rootfs.diff.tar",
  dockerGzip: "application/vnd.docker.image.rootfs.diff.tar.gzip",
  dockerZstd: "application/vnd.docker.image.rootfs.diff.tar.zstd",
  dockerForeign: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
  dockerSchema1: "application/vnd.docker.distribution.manifest.v1+prettyjws",
} as const;

export type Format = "oci" | "docker";
export type Algorithm = "sha256" | "sha512";

export interface Platform {
  os: string;
  architecture: string;
  variant?: string;
}

export interface Descriptor {
  mediaType: string;
  digest: string;
  size: number;
  urls?: string[];
  platform?: Platform;
  annotations?: Record<string, string>;
  artifactType?: string;
}

export interface ManifestJson {
  schemaVersion: number;
  mediaType: string;
  config: Descriptor;
  layers: Descriptor[];
  [field: string]: unknown;
}

export interface IndexJson {
  schemaVersion: number;
  mediaType: string;
  manifests: Descriptor[];
  [field: string]: unknown;
}

export interface ManifestBytes {
  mediaType: string;
  bytes: Buffer;
}

/**
 * Anything that a registry can hold under a tag: `manifests` has this manifest and every one below
 * it.
 */
export interface TestContent {
  mediaType: string;
  digest: string;
  bytes: Buffer;
  /** Configs and layers by digest. */
  blobs: Map<string, Buffer>;
  manifests: Map<string, ManifestBytes>;
  /** Digests of the configs among `blobs`. */
  configs: Set<string>;
  platform?: Platform;
}

export interface TestLayer {
  mediaType: string;
  digest: string;
  diffId: string;
  bytes: Buffer;
  files: Map<string, Buffer>;
  urls?: string[];
  annotations?: Record<string, string>;
}

export interface TestImage extends TestContent {
  manifest: ManifestJson;
  platform: Platform;
  /** Descriptor and bytes of the config. */
  config: Descriptor;
  configBytes: Buffer;
  layers: TestLayer[];
}

export interface TestIndex extends TestContent {
  index: IndexJson;
  children: TestContent[];
}

export function digestOf(bytes: Buffer | string, algorithm: Algorithm = "sha256"): string {
  return `${algorithm}:${createHash(algorithm).update(bytes).digest("hex")}`;
}

/** The same incompressible bytes for the same seed, on every machine. */
export function pseudoRandom(seed: string, sizeBytes: number): Buffer {
  const key = createHash("sha256").update(seed).digest();
  return createCipheriv("aes-256-ctr", key, Buffer.alloc(16)).update(Buffer.alloc(sizeBytes));
}

export function parsePlatform(text: string): Platform {
  const [os = "", architecture = "", variant] = text.split("/");
  return variant === undefined ? { os, architecture } : { os, architecture, variant };
}

// ====== Tar ======

function octal(value: number, width: number): string {
  return `${value.toString(8).padStart(width - 1, "0")}\0`;
}

function tarHeader(name: string, sizeBytes: number): Buffer {
  const directory = name.endsWith("/");
  const header = Buffer.alloc(512);
  if (Buffer.byteLength(name) > 100) throw new Error(`tar name too long for a test layer: ${name}`);
  header.write(name, 0);
  header.write(octal(directory ? 0o755 : 0o644, 8) + octal(0, 8) + octal(0, 8), 100);
  header.write(octal(sizeBytes, 12) + octal(0, 12), 124);
  header.write(" ".repeat(8) + (directory ? "5" : "0"), 148);
  header.write("ustar\x0000", 257, "latin1");
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  return header;
}

/** A ustar archive of regular files (and, for names that end in `/`, directories), mtime 0. */
export function writeTar(files: Iterable<[string, Buffer]>): Buffer {
  const parts: Buffer[] = [];
  for (const [name, bytes] of files) {
    parts.push(tarHeader(name, bytes.length), bytes, Buffer.alloc(-bytes.length & 511));
  }
  return Buffer.concat([...parts, Buffer.alloc(1024)]);
}

/** A symbolic link, to stand before an archive's first entry. */
export function writeLink(name: string, target: string): Buffer {
  const header = tarHeader(name, 0);
  header.write("2", 156, "latin1");
  header.write(target, 157, "latin1");
  header.write(" ".repeat(8), 148, "latin1");
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(octal(sum, 7), 148, "latin1");
  return header;
}

export interface TarEntry {
  name: string;
  /**
   * Where the entry's first header begins (a PAX header counts as part of its entry), and where its
   * bytes begin.
   */
  headerOffset: number;
  offset: number;
  size: number;
  type: string;
  mode: number;
  uid: number;
  gid: number;
  mtime: number;
  /** Its PAX records, if any. */
  pax: Map<string, string>;
}

function readPax(bytes: Buffer): Map<string, string> {
  const records = new Map<string, string>();
  for (let at = 0; at < bytes.length; ) {
    const space = bytes.indexOf(" ", at);
    const length = Number(bytes.toString("latin1", at, space));
    if (!(length > 0)) throw new Error(`bad PAX record at ${at}`);
    const record = bytes.toString("utf8", space + 1, at + length - 1);
    const equals = record.indexOf("=");
    records.set(record.slice(0, equals), record.slice(equals + 1));
    at += length;
  }
  return records;
}

function readHeader(header: Buffer, at: number): TarEntry {
  const text = (from: number, length: number) =>
    header.toString("utf8", from, from + length).replace(/\0.*$/s, "");
  const number = (from: number, length: number) => parseInt(text(from, length).trim() || "0", 8);
  const sum = header.reduce(
    (total, byte, index) => total + (index >= 148 && index < 156 ? 32 : byte),
    0,
  );
  if (sum !== number(148, 8)) throw new Error(`wrong tar checksum in the header at ${at}`);
  const prefix = text(257, 6) === "ustar" && header[263] === 0x30 ? text(345, 155) : "";
  return {
    name: prefix ? `${prefix}/${text(0, 100)}` : text(0, 100),
    headerOffset: at,
    offset: at + 512,
    size: number(124, 12),
    type: text(156, 1) || "0",
    mode: number(100, 8),
    uid: number(108, 8),
    gid: number(116, 8),
    mtime: number(136, 12),
    pax: new Map(),
  };
}

/**
 * A strict reader: checksums, PAX path and size, padding and the end of two zero blocks, or it
 * throws.
 */
export function readTar(tar: Buffer): TarEntry[] {
  const entries: TarEntry[] = [];
  let pax = new Map<string, string>();
  let paxOffset: number | undefined;
  for (let at = 0; ; ) {
    const header = tar.subarray(at, at + 512);
    if (header.length < 512) throw new Error(`the tar ends without its trailer at ${at}`);
    if (header.every((byte) => byte === 0)) {
      const rest = tar.subarray(at);
      if (rest.length < 1024 || !rest.every((byte) => byte === 0))
        throw new Error(`bad tar trailer at ${at}`);
      return entries;
    }
    const entry = readHeader(header, at);
    if (entry.type === "x") {
      pax = readPax(tar.subarray(entry.offset, entry.offset + entry.size));
      paxOffset = at;
    } else {
      entry.pax = pax;
      entry.name = pax.get("path") ?? entry.name;
      entry.size = Number(pax.get("size") ?? entry.size);
      entry.headerOffset = paxOffset ?? at;
      entries.push(entry);
      pax = new Map();
      paxOffset = undefined;
    }
    at = entry.offset + Math.ceil(entry.size / 512) * 512;
    if (at > tar.length) throw new Error(`the tar ends within ${entry.name}`);
    if (!tar.subarray(entry.offset + entry.size, at).every((byte) => byte === 0)) {
      throw new Error(`padding after ${entry.name} is not zero`);
    }
  }
}

// ====== Compression ======
// Stored blocks only: zlib's compressed output differs between Node versions, and with it every
// digest; and stored blocks have a size that is known beforehand. Both formats have a place for
// filling up to the byte.

function gzipStored(tar: Buffer, fillBytes: number): Buffer {
  const header = Buffer.from([0x1f, 0x8b, 8, fillBytes ? 4 : 0, 0, 0, 0, 0, 0, 255]);
  const extra = Buffer.alloc(fillBytes);
  if (fillBytes) {
    extra.writeUInt16LE(fillBytes - 2, 0);
    extra.write("im", 2);
    extra.writeUInt16LE(fillBytes - 6, 4);
  }
  const parts: Buffer[] = [header, extra];
  for (let at = 0; at < tar.length; at += 65535) {
    const block = tar.subarray(at, at + 65535);
    const blockHeader = Buffer.from([at + 65535 >= tar.length ? 1 : 0, 0, 0, 0, 0]);
    blockHeader.writeUInt16LE(block.length, 1);
    blockHeader.writeUInt16LE(block.length ^ 0xffff, 3);
    parts.push(blockHeader, block);
  }
  const trailer = Buffer.alloc(8);
  trailer.writeUInt32LE(crc32(tar), 0);
  trailer.writeUInt32LE(tar.length % 2 ** 32, 4);
  return Buffer.concat([...parts, trailer]);
}

/**
 * RFC 8878 by hand, because Node 20 has no zstd: raw blocks in a frame of 128 KiB windows, and a
 * skippable frame.
 */
function zstdStored(tar: Buffer, fillBytes: number): Buffer {
  const parts: Buffer[] = [Buffer.from([0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38])];
  for (let at = 0; at < tar.length; at += 131072) {
    const block = tar.subarray(at, at + 131072);
    const blockHeader = Buffer.alloc(3);
    blockHeader.writeUIntLE(block.length * 8 + (at + 131072 >= tar.length ? 1 : 0), 0, 3);
    parts.push(blockHeader, block);
  }
  if (fillBytes) {
    const skippable = Buffer.alloc(fillBytes);
    skippable.writeUInt32LE(0x184d2a50, 0);
    skippable.writeUInt32LE(fillBytes - 8, 4);
    parts.push(skippable);
  }
  return Buffer.concat(parts);
}

// ====== Layers ======

export type Compression = "gzip" | "zstd" | "none";

export interface LayerOptions {
  /**
   * Size of the blob: to the byte for gzip and zstd, rounded down to 512 for "none". At least 4096;
   * default 8192.
   */
  sizeBytes?: number;
  /** Same seed, same options: same layer. */
  seed?: string;
  compression?: Compression;
  format?: Format;
  algorithm?: Algorithm;
  /**
   * Further files of the layer, beside `etc/<seed>.txt` (which holds the seed) and the filling
   * `data/<seed>.bin`.
   */
  files?: Record<string, string | Buffer>;
  /**
   * Makes it a foreign (non-distributable) layer. Give registry.add `{ without: [digest] }` to keep
   * the blob away.
   */
  urls?: string[];
  mediaType?: string;
  annotations?: Record<string, string>;
}

const OVERHEAD: Record<Compression, (tarBytes: number) => number> = {
  gzip: (tarBytes) => 18 + 5 * Math.ceil(tarBytes / 65535),
  zstd: (tarBytes) => 6 + 3 * Math.ceil(tarBytes / 131072),
  none: () => 0,
};

function layerMediaType(format: Format, compression: Compression, foreign: boolean): string {
  if (foreign) return format === "oci" ? MEDIA.ociForeign : MEDIA.dockerForeign;
  if (compression === "none") return format === "oci" ? MEDIA.ociTar : MEDIA.dockerTar;
  if (compression === "zstd") return format === "oci" ? MEDIA.ociZstd : MEDIA.dockerZstd;
  return format === "oci" ? MEDIA.ociGzip : MEDIA.dockerGzip;
}

export function makeLayer(options: LayerOptions = {}): TestLayer {
  const {
    sizeBytes = 8192,
    seed = "layer",
    compression = "gzip",
    format = "oci",
    algorithm = "sha256",
  } = options;
  const name = seed.replace(/[^A-Za-z0-9._-]/g, "-").slice(-60);
  const files = new Map<string, Buffer>([
    ["etc/", Buffer.alloc(0)],
    [`etc/${name}.txt`, Buffer.from(`${seed}\n`)],
  ]);
  for (const [path, content] of Object.entries(options.files ?? {}))
    files.set(path, Buffer.from(content));
  files.set("data/", Buffer.alloc(0));

  const fixedBytes = writeTar(files).length + 512;
  const overhead = OVERHEAD[compression];
  let tarBytes = sizeBytes - (sizeBytes % 512);
  const fill = () => (compression === "none" ? 0 : sizeBytes - tarBytes - overhead(tarBytes));
  while (fill() !== 0 && fill() < 8) tarBytes -= 512;
  if (tarBytes < fixedBytes)
    throw new Error(`a layer of ${sizeBytes} bytes cannot hold its files (${fixedBytes})`);

  files.set(`data/${name}.bin`, pseudoRandom(seed, tarBytes - fixedBytes));
  const tar = writeTar(files);
  const bytes =
    compression === "none" ? tar : (compression === "gzip" ? gzipStored : zstdStored)(tar, fill());
  return {
    mediaType: options.mediaType ?? layerMediaType(format, compression, options.urls !== undefined),
    digest: digestOf(bytes, algorithm),
    diffId: digestOf(tar),
    bytes,
    files,
    ...(options.urls && { urls: options.urls }),
    ...(options.annotations && { annotations: options.annotations }),
  };
}

// ====== Manifests ======

/**
 * Any manifest whatever, schema 1 and nonsense included; `content` is sent as it is, or as its
 * JSON.
 */
export function makeManifest(
  mediaType: string,
  content: unknown,
  algorithm: Algorithm = "sha256",
): TestContent {
  const bytes = Buffer.isBuffer(content) ? content : Buffer.from(JSON.stringify(content, null, 2));
  const digest = digestOf(bytes, algorithm);
  const manifests = new Map([[digest, { mediaType, bytes }]]);
  return { mediaType, digest, bytes, blobs: new Map(), manifests, configs: new Set() };
}

export interface ImageOptions {
  seed?: string;
  format?: Format;
  /** `os/architecture[/variant]`; default linux/amd64. */
  platform?: string;
  /**
   * Sizes in bytes, options, or layers made before (to share them between images); default two
   * layers.
   */
  layers?: (number | LayerOptions | TestLayer)[];
  algorithm?: Algorithm;
  /**
   * What it returns takes the place of the config or manifest: a Buffer as it is, all else as JSON.
   */
  editConfig?: (config: Record<string, unknown>) => unknown;
  editManifest?: (manifest: ManifestJson) => unknown;
}

function asBytes(edited: unknown): Buffer {
  return Buffer.isBuffer(edited) ? edited : Buffer.from(JSON.stringify(edited));
}

function makeImageLayers(options: ImageOptions, seed: string): TestLayer[] {
  const { format = "oci", algorithm = "sha256" } = options;
  return (options.layers ?? [8192, 16384]).map((layer, position) => {
    if (typeof layer === "object" && "diffId" in layer) return layer;
    const given = typeof layer === "number" ? { sizeBytes: layer } : layer;
    return makeLayer({ seed: `${seed}-layer${position + 1}`, format, algorithm, ...given });
  });
}

function describeLayer(layer: TestLayer): Descriptor {
  return {
    mediaType: layer.mediaType,
    digest: layer.digest,
    size: layer.bytes.length,
    ...(layer.urls && { urls: layer.urls }),
    ...(layer.annotations && { annotations: layer.annotations }),
  };
}

export function makeImage(options: ImageOptions = {}): TestImage {
  const { seed = "image", format = "oci", algorithm = "sha256" } = options;
  const platform = parsePlatform(options.platform ?? "linux/amd64");
  const layers = makeImageLayers(options, seed);
  const config = {
    created: "2020-01-01T00:00:00Z",
    ...platform,
    config: { Cmd: ["/bin/true"], Labels: { seed } },
    rootfs: { type: "layers", diff_ids: layers.map((layer) => layer.diffId) },
    history: layers.map((_, position) => ({
      created: "2020-01-01T00:00:00Z",
      created_by: `layer ${position + 1}`,
    })),
  };
  const configBytes = asBytes(options.editConfig ? options.editConfig(config) : config);
  const configDescriptor: Descriptor = {
    mediaType: format === "oci" ? MEDIA.ociConfig : MEDIA.dockerConfig,
    digest: digestOf(configBytes, algorithm),
    size: configBytes.length,
  };
  const mediaType = format === "oci" ? MEDIA.ociManifest : MEDIA.dockerManifest;
  const manifest: ManifestJson = {
    schemaVersion: 2,
    mediaType,
    config: configDescriptor,
    layers: layers.map(describeLayer),
  };
  const content = makeManifest(
    mediaType,
    options.editManifest ? options.editManifest(manifest) : manifest,
    algorithm,
  );
  content.blobs.set(configDescriptor.digest, configBytes);
  for (const layer of layers) content.blobs.set(layer.digest, layer.bytes);
  content.configs.add(configDescriptor.digest);
  return { ...content, manifest, platform, config: configDescriptor, configBytes, layers };
}

export interface IndexEntry {
  content: TestContent;
  /** Default: the image's own; null leaves it out. */
  platform?: string | null;
  /** Laid over the descriptor. */
  fields?: Record<string, unknown>;
}

export interface IndexOptions {
  format?: Format;
  algorithm?: Algorithm;
  editIndex?: (index: IndexJson) => unknown;
}

/**
 * An index of images, indexes (nested), artifacts; a makeAttestation() child gets its
 * unknown/unknown entry.
 */
export function makeIndex(
  children: (TestContent | IndexEntry)[],
  options: IndexOptions = {},
): TestIndex {
  const { format = "oci", algorithm = "sha256" } = options;
  const entries = children.map(
    (child): IndexEntry => ("content" in child ? child : { content: child }),
  );
  const manifests = entries.map(({ content, platform, fields }) => {
    const { mediaType, digest, bytes } = content;
    const own = platform === undefined ? content.platform : undefined;
    const chosen = platform ? parsePlatform(platform) : own;
    return {
      mediaType,
      digest,
      size: bytes.length,
      ...(chosen && { platform: chosen }),
      ...fields,
    };
  });
  const mediaType = format === "oci" ? MEDIA.ociIndex : MEDIA.dockerList;
  const index: IndexJson = { schemaVersion: 2, mediaType, manifests };
  const made = makeManifest(
    mediaType,
    options.editIndex ? options.editIndex(index) : index,
    algorithm,
  );
  for (const { content } of entries) {
    for (const [digest, bytes] of content.blobs) made.blobs.set(digest, bytes);
    for (const [digest, manifest] of content.manifests) made.manifests.set(digest, manifest);
    for (const digest of content.configs) made.configs.add(digest);
  }
  return { ...made, index, children: entries.map((entry) => entry.content) };
}

export interface MultiPlatformOptions extends Omit<ImageOptions, "platform"> {
  editIndex?: (index: IndexJson) => unknown;
  /** Adds an attestation beside each image, as BuildKit does. */
  attestations?: boolean;
}

/**
 * One image a platform (other layers each), under one index. `children` are in the order of
 * `platforms`.
 */
export function makeMultiPlatform(
  platforms: string[],
  options: MultiPlatformOptions = {},
): TestIndex {
  const { seed = "multi" } = options;
  const images = platforms.map((platform) =>
    makeImage({ ...options, platform, seed: `${seed}-${platform}` }),
  );
  const attestations = options.attestations ? images.map(makeAttestation) : [];
  return makeIndex([...images, ...attestations], options);
}

/**
 * BuildKit's form of provenance: a manifest with an in-toto statement, listed for the platform
 * unknown/unknown.
 */
export function makeAttestation(image: TestImage): IndexEntry {
  const statement = Buffer.from(
    JSON.stringify({ _type: "https://in-toto.io/Statement/v0.1", subject: image.digest }),
  );
  const content = makeArtifact({
    configMediaType: MEDIA.ociConfig,
    configBytes: Buffer.from(
      JSON.stringify({ architecture: "unknown", os: "unknown", rootfs: { type: "layers" } }),
    ),
    layers: [{ mediaType: "application/vnd.in-toto+json", bytes: statement }],
  });
  const annotations = {
    "vnd.docker.reference.type": "attestation-manifest",
    "vnd.docker.reference.digest": image.digest,
  };
  return { content, platform: "unknown/unknown", fields: { annotations } };
}

export interface ArtifactOptions {
  artifactType?: string;
  /** What it refers to. */
  subject?: TestContent;
  configMediaType?: string;
  configBytes?: Buffer;
  layers: { mediaType: string; bytes: Buffer; annotations?: Record<string, string> }[];
}

export function makeArtifact(options: ArtifactOptions): TestContent {
  const { configMediaType = MEDIA.ociEmpty, configBytes = Buffer.from("{}") } = options;
  const describe = (mediaType: string, bytes: Buffer) => ({
    mediaType,
    digest: digestOf(bytes),
    size: bytes.length,
  });
  const { subject } = options;
  const content = makeManifest(MEDIA.ociManifest, {
    schemaVersion: 2,
    mediaType: MEDIA.ociManifest,
    artifactType: options.artifactType,
    subject: subject && { ...describe(subject.mediaType, subject.bytes), digest: subject.digest },
    config: describe(configMediaType, configBytes),
    layers: options.layers.map(({ bytes, ...layer }) => ({
      ...describe(layer.mediaType, bytes),
      ...layer,
    })),
  });
  content.blobs.set(digestOf(configBytes), configBytes);
  content.configs.add(digestOf(configBytes));
  for (const { bytes } of options.layers) content.blobs.set(digestOf(bytes), bytes);
  return content;
}

export function makeHelmChart(seed = "chart"): TestContent {
  const chart = makeLayer({
    seed,
    files: { "chart/Chart.yaml": `apiVersion: v2\nname: ${seed}\nversion: 1.0.0\n` },
  });
  return makeArtifact({
    configMediaType: "application/vnd.cncf.helm.config.v1+json",
    configBytes: Buffer.from(JSON.stringify({ apiVersion: "v2", name: seed, version: "1.0.0" })),
    layers: [
      { mediaType: "application/vnd.cncf.helm.chart.content.v1.tar+gzip", bytes: chart.bytes },
    ],
  });
}

/** As `oras push` makes it: an empty config, an artifactType, files with their titles. */
export function makeOrasArtifact(seed = "artifact"): TestContent {
  return makeArtifact({
    artifactType: "application/vnd.example.report",
    layers: [
      {
        mediaType: "text/plain",
        bytes: Buffer.from(`report of ${seed}\n`),
        annotations: { "org.opencontainers.image.title": "report.txt" },
      },
    ],
  });
}

/** Things whose config has an image's media type, though they are none. */
export function makeImageLookalikes(): Record<string, TestContent> {
  const imageConfig = "application/vnd.oci.image.config.v1+json";
  const signature = Buffer.from(JSON.stringify({ critical: { type: "cosign" } }));
  const withDiffIds = { architecture: "", os: "", rootfs: { diff_ids: [digestOf(signature)] } };
  const model = { model_format: "gguf", rootfs: { diff_ids: [digestOf("weights")] } };
  const tar = makeLayer({ seed: "lookalike" }).bytes;
  return {
    // cosign sign: https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
    signature: makeArtifact({
      configMediaType: imageConfig,
      configBytes: Buffer.from(JSON.stringify(withDiffIds)),
      layers: [{ mediaType: "application/vnd.dev.cosign.simplesigning.v1+json", bytes: signature }],
    }),
    // ollama push
    model: makeArtifact({
      configMediaType: "application/vnd.docker.container.image.v1+json",
      configBytes: Buffer.from(JSON.stringify(model)),
      layers: [{ mediaType: "application/vnd.ollama.image.model", bytes: Buffer.from("weights") }],
    }),
    // An early oras push: https://github.com/oras-project/oras/issues/129
    files: makeArtifact({
      configMediaType: imageConfig,
      layers: [{ mediaType: "application/vnd.oci.image.layer.v1.tar", bytes: tar }],
    }),
  };
}

export function makeWasmArtifact(seed = "wasm"): TestContent {
  return makeArtifact({
    configMediaType: "application/vnd.wasm.config.v0+json",
    configBytes: Buffer.from(JSON.stringify({ architecture: "wasm", os: "wasip1" })),
    layers: [
      {
        mediaType: "application/wasm",
        bytes: Buffer.concat([Buffer.from("\0asm\x01\0\0\0"), pseudoRandom(seed, 512)]),
      },
    ],
  });
}
