/*
 * imgpull: pull container images from an OCI registry into one verified tar. It only pulls.
 *
 *   1 imports, media types, limits · 2 public types · 3 errors · 4 primitives · 5 references
 *   6 transport · 7 retry · 8 credentials and tokens · 9 registry · 10 manifests and platforms
 *   11 tar · 12 pull · 13 proof · 14 library · 15 looking at a tar · 16 command line · 17 exports
 *
 * Data flows one way: options → references → manifests → plan (every entry with its offset)
 *   → bytes → DEST.
 *
 * Every request that is made:
 *   GET and HEAD /v2/REPOSITORY/manifests/…, GET /v2/REPOSITORY/blobs/…, and what these redirect to
 *     (sections 6, 9)
 *   with --referrers or --signed-by also GET /v2/REPOSITORY/referrers/… (sections 9, 13)
 *   GET /v2/, where a registry refuses without a word on how to show the credential that is at hand
 *     (section 9)
 *   GET or POST to the token endpoint that the registry names (section 8)
 *   all of these to the mirrors of --mirror, each as a registry of its own (section 9)
 *   CONNECT to a proxy that the environment names, and where it only closes, once the beginning of
 *     SOCKS and of TLS (section 6)
 *   GET of the `urls` of a foreign layer that the registry does not have, without any credential
 *     (section 9)
 *
 * Every file that is read:
 *   --cert, --key, --cacert; the system's certificates; /etc/docker/certs.d/HOST/* (section 6)
 *   docker's and podman's credential files (section 8)
 *   --reuse, --since, DEST as it was, and what an earlier run left beside it (sections 11, 12)
 *   --signed-by (section 14)
 *   --from, and stdin where - or --password-stdin asks for it (section 16)
 *   the tar or folder to look at, and the base of --since (section 15)
 *   of Linux, what tells one process from another: boot_id, the namespace, its start in
 *     /proc/PID/stat (section 12)
 * Every file that is written: DEST, and meanwhile DEST.partial with DEST.partial.journal, .lock and
 *   .old (section 12); in a folder the same for each blob, and .imgpull.partial.journal and .lock;
 *   each of them first under a name with the run's id.
 * Every program that is run: docker-credential-NAME, where a credential file names it, found by
 *   PATH (section 8).
 *
 * Every environment variable that is read:
 *   HOME, DOCKER_CONFIG, DOCKER_AUTH_CONFIG, REGISTRY_AUTH_FILE, XDG_RUNTIME_DIR, XDG_CONFIG_HOME
 *     (section 8)
 *   SSL_CERT_FILE, SSL_CERT_DIR, NODE_EXTRA_CA_CERTS (section 6)
 *   HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, and the same in lower case (section 6)
 *   NO_COLOR, TERM (section 16)
 *
 * Not here on purpose: push, serve, build, run, sign, convert, recompress, schema 1, a cache
 *   outside DEST.
 */

// ====== 1. Imports, media types, limits ======
import type { ExecFileException } from "node:child_process";
import type { Hash, KeyObject } from "node:crypto";
import { once, setMaxListeners } from "node:events";
import {
  appendFileSync,
  type BigIntStats,
  closeSync,
  constants,
  createWriteStream,
  promises as fs, // loaded at its first use
  open as openCallback,
  openSync,
} from "node:fs";
import type * as http from "node:http";
import * as net from "node:net";
import * as os from "node:os";
import * as path from "node:path";
// decodeURIComponent that does not throw
import { unescape as percentDecode } from "node:querystring";
import { addAbortSignal, Readable, type Transform, type Writable } from "node:stream";
import { finished, pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import type * as tls from "node:tls";
import { parseArgs } from "node:util";

/**
 * For the modules of Node that take long to load (crypto, http, https, tls, zlib, child_process):
 * each is loaded at its first use, so that `--version` needs none of them and a pull over http two.
 */
const load = process.getBuiltinModule;

const isWindows = process.platform === "win32";

// build.mjs puts these in.
declare const IMGPULL_VERSION: string;
declare const IMGPULL_BUILD_DATE: string;

const DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1";
const DOCKER_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json";
const OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json";
const INDEX_TYPES = [OCI_INDEX, DOCKER_INDEX];
const MANIFEST_TYPES = [...INDEX_TYPES, OCI_MANIFEST, DOCKER_MANIFEST];
const CONFIG_TYPES = [DOCKER_CONFIG_TYPE, OCI_CONFIG_TYPE];

const MIB = 1024 * 1024;
const NEVER = Number.POSITIVE_INFINITY;

/** Safety: what a peer, a file or a user can make us hold, do or wait for, whatever it sends. */
const LIMITS = Object.freeze({
  manifestBytes: 4 * MIB, // the distribution specification's own floor for registries
  configBytes: 16 * MIB, // image configs are some KiB; a label may hold an SBOM
  tokenBytes: MIB, // tokens are some KiB
  errorBodyBytes: MIB / 16, // a sentence is shown of it
  keyFileBytes: MIB / 16, // a public key has some hundred bytes
  credentialFileBytes: 4 * MIB, // docker's config.json; this one may be a device or a mistake
  tarMetadataBytes: 16 * MIB, // index.json and the like of a tar that someone else made
  // a pax header or the map of a sparse file; Go's reader has the same bound
  tarExtensionBytes: MIB,
  paxRecords: 5_000_000, // of a tar, all together; each file has a dozen
  tarEntries: 200_000, // a thousand images in docker's old form have a hundred each
  // that the names of a tar lead through: real ones have two, or one for each layer
  tarFolders: 200_000,
  tarNameBytes: 4096, // of a name in a tar, or a link's target: no file system has longer ones
  tarNamesBytes: 16 * MIB, // of all of them: a thousand images in the old form have half as much
  tarSmallDocumentBytes: MIB / 4, // most manifests, configs and signatures have less
  tarDocumentBytes: 64 * MIB, // indexes, manifests and configs of a tar that are held at once
  problemLines: 1000, // that are said of a tar; a report has them all
  jsonDepth: 100, // of a document in a tar; real ones have five
  jsonValues: 1_000_000, // a few dozen bytes of memory each
  tarReferences: 300_000, // manifests and layers that the images of a tar name, all together
  unpackFactor: 1000, // deflate makes a thousandth at best: what is beyond has no end,
  unpackFloorBytes: 1024 * MIB, // nor has what is beyond this much besides
  layerPaths: 1_000_000, // of a layer that is unpacked for a trial; real ones have some thousands
  layerLinkBytes: 8 * MIB, // of the targets of its symbolic links
  unpackedNameBytes: 255, // of each part of a path, on every file system there is
  unpackedPathBytes: 3900, // of a path: 4096 less what stands before it where it is unpacked
  unpackedLinkBytes: 4095, // of what a symbolic link leads to
  // what a header, a pax record and a piece of a file cost besides, in bytes that are hashed
  headerCostBytes: 2000,
  recordCostBytes: 300,
  pieceCostBytes: 1000,
  attributeBytes: 4000, // of a file's extended attributes, all together: ext4 has a block for them
  mirrorFailures: 2, // what passes by itself: of more, another place has it sooner
  indexDepth: 4, // an index inside an index; real ones are one or two deep
  indexEntries: 1024, // with `platforms` "all" each entry is a request
  manifests: 2048, // of one reference, all its indexes together
  layers: 100_000, // of one reference: real images have a hundred
  documentBytes: 80 * MIB, // manifests and configs of one pull: a thousand images have 50
  signatures: 1000, // of one image: each is a request
  bundleJsonValues: 10_000, // of a Sigstore bundle, which has some hundred where it has log entries
  referrerPages: 100, // lists of less than ten are not worth pages
  referrers: 1000, // of one image, and of its referrers: each is a request
  referrerDepth: 4, // a signature of an attestation of an image is two deep
  headerBytes: MIB, // Google's registry has sent 21 KB; Node's own bound is 16 KiB
  // shorter ones are in every sentence; below twice that, only words from outside are searched
  secretLength: 4,
  signaturesKept: 64, // of signed URLs, to be struck out of what is said of them
  helperMs: 60_000, // a helper may ask a password manager, and that one a person
  // a proxy that closed without a word is asked once whether it speaks SOCKS or TLS
  diagnosisMs: 2000,
  redirects: 10, // as browsers and Go have it
  // read, so that the connection can be kept; of a longer one nothing more is taken
  redirectBodyBytes: 64 * 1024,
  headersWaitFactor: 4, // times the time-out: a cache may have to fetch a layer before it answers
  documentWaitFactor: 4, // times the time-out, for a manifest, config or token to be whole
  // of a blob, from a server that gives less than it was asked for: slivers have no end
  leastAnswerBytes: MIB / 16,
  // a blob that comes more slowly, over twice the time-out, does not come at all
  slowBytesPerSecond: 1024,
  // the token specification's default, and more than a skewed clock takes away
  tokenFloorMs: 60_000,
  firstBackoffMs: 1000, // most lost connections are back at once
  backoffMs: 30_000, // and a registry that restarts is back within a minute or two
  retryAfterMs: 120_000, // longer waits are the user's to decide
  absurdWaitMs: 366 * 24 * 3600 * 1000, // beyond that, no date is told
  lockBeatMs: 10_000, // how often a lock is touched
  // a lock that nobody has touched for so long is nobody's: six beats, for disks can stall
  lockStaleMs: 60_000,
  lockBirthMs: 200, // how long a lock may be there without a word, where it cannot be linked whole
  lockBytes: 4096, // anyone may have written it
});

/** Speed: measured, and free to change. No promise depends on them. */
const TUNING = Object.freeze({
  batchMs: 1000, // how long bytes may wait for more of them before they are written, and recorded
  // one write to disk: fewer trips to Node's thread pool than one for each chunk
  batchBytes: MIB / 2,
  gatherBytes: 2 * MIB, // of all connections together: each has as much under way besides
  // how much a kill -9 may cost each blob, beside what a connection has gathered
  journalBytes: MIB / 2,
  // the disk works while the line does, and little is left for the sync at the end
  syncBytes: 32 * MIB,
  splitBytes: MIB / 8, // no range is worth a request of its own below that,
  worthMs: 50, // nor where it would bring so much sooner the end
  unitBytes: 8 * MIB, // ranges of one blob side by side: the hash is at most so many units behind
  smallBytes: MIB / 16, // a blob that may be asked for twice, to see whether a cache has it by then
  // what may wait in memory for its turn to be hashed; what else came early is read back
  earlyBytes: 2 * MIB,
  earlyPieceBytes: 1024, // of which a piece takes so much at least
  firstConnections: 8, // at first, before anything was measured
  growth: 4, // times as many are tried next
  noise: 0.1, // a trial has to bring more than that
  fastBytesPerMs: 32_000, // of one connection: from there on a trial has to be worth more,
  fastNoise: 0.3, // has to bring more,
  fastMeasureMs: 500, // does not begin sooner,
  fastWorthMs: 3000, // nor with less work left
  trialChances: 2, // stretches in which it can show that
  firstMeasureMs: 40, // stretches over which bytes are counted, the very first one
  measureMs: 80, // and all others
  // before the next trial, after one that brought nothing; then four times as long
  trialPauseMs: 2000,
  worthTryingMs: 500, // of work that is left
  // answers that are later than three times the quickest, and that, had to be fetched first
  promptMs: 20,
  // and five times the quickest: a range that is not answered by then is left to its neighbour
  lateMs: 500,
  // share of Node's event loop that can be in use: no trial brings more than what is missing to
  // that
  busyLoop: 0.95,
  tickMs: 20, // how often all this is looked at
  // for each of a host's addresses but the last: one lost packet on a slow line is no reason to
  // give up
  addressMs: 3000,
  readerPollMs: 50, // DEST that is a pipe: how soon we see that somebody reads it,
  readerNewsMs: 2000, // and when we say that nobody does
  streamWindowBytes: 32 * MIB, // DEST `-`: how far the line may be ahead of the reader
  headerReadBytes: 64 * 1024, // of a tar: small entries stand side by side
  unpackBytes: 256 * 1024, // at once: fewer trips to Node's thread pool
  unpackLanes: 4, // files of a tar at once: Node's thread pool has as many threads
});

// ====== 2. Public types ======
// The library's face. An editor shows each field's comment: shape, unit, default.

/**
 * An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant:
 * "v7" }`.
 */
interface Platform {
  os: string;
  architecture: string;
  variant?: string;
}

/** A content descriptor (OCI image specification, descriptor.md). */
interface Descriptor {
  mediaType: string;
  /** `sha256:` and 64, or `sha512:` and 128 hex digits. */
  digest: string;
  /** In bytes. */
  size: number;
  /** Where the content can be had besides: foreign layers only. */
  urls?: string[];
  /** In an index: what the manifest is for. */
  platform?: Platform;
  annotations?: Record<string, string>;
  /** @internal The content itself, where the descriptor brings it along and it has the digest. */
  data?: Buffer;
}

/**
 * Where a tar can be written to: Node's Writables are such (a socket, a child's stdin,
 * process.stdout).
 */
interface OutputStream {
  write(chunk: Uint8Array): boolean;
  on(event: string, listener: (...values: unknown[]) => void): unknown;
}

/**
 * How images are pulled. All of it is optional, and `undefined` is as if an option was not there.
 */
interface PullOptions {
  /** How registries are spoken to; default `https`. */
  scheme?: "https" | "http" | undefined;

  /** Operating system wanted, in Go's words (`linux`); default: this machine's, or else linux. */
  osType?: string | undefined;
  /** Processor wanted, in Go's words (`amd64`, `arm64`); default: this machine's. */
  archType?: string | undefined;
  /** Variant of the processor wanted (`v7`); default: the best that suits `archType`. */
  variant?: string | undefined;
  /**
   * Platforms wanted, as `OS/ARCH` or `OS/ARCH/VARIANT`; `"all"`: every one that there is. With
   * more than one, the image's index is kept. Excludes `osType`, `archType` and `variant`.
   */
  platforms?: "all" | readonly string[] | undefined;

  /** The name that the image gets in DEST; one reference only. Excludes `renames`. */
  name?: string | undefined;
  /**
   * Names in DEST that begin with a key begin with its value instead: `{ "docker.io":
   * "registry.corp/hub" }`. Whole path segments count, and the longest key wins.
   */
  renames?: Readonly<Record<string, string>> | undefined;
  /** Paths of tars: blobs that one of them holds are copied from there, and verified. */
  reuse?: readonly string[] | undefined;
  /** Path of a tar that the receiving side has: layers that it holds are left out. */
  since?: string | undefined;
  /** Brings what refers to the images: signatures, attestations, SBOMs; default false. */
  referrers?: boolean | undefined;
  /**
   * Public keys, each as PEM or as the path of a PEM file: an image that none of them has signed is
   * refused. What refers to the images comes along.
   */
  signedBy?: readonly string[] | undefined;
  /** Resolves everything, says what would come, and writes nothing; default false. */
  dryRun?: boolean | undefined;

  /**
   * For basic credentials, with `password`; default: docker's and podman's credential files are
   * asked.
   */
  username?: string | undefined;
  /** The password of `username`. */
  password?: string | undefined;
  /** An outside token (ECR's), sent as `Authorization: Basic TOKEN`. Excludes `username`. */
  token?: string | undefined;

  /** Path of a PEM file: the client's certificate. Needs `tlsKey`. */
  tlsCert?: string | undefined;
  /** Path of a PEM file: the key of `tlsCert`. */
  tlsKey?: string | undefined;
  /** Path of a PEM file: certificate authorities that are trusted besides the system's. */
  caCert?: string | undefined;
  /** Does not verify the server's certificate; default false. */
  insecure?: boolean | undefined;
  /** The upstream registry that a mirror stands for: `?ns=HOST` on every request. */
  namespace?: string | undefined;
  /**
   * Where the images of a registry are asked for before the registry itself, in this order, each as
   * `[http[s]://]HOST[:PORT][/PREFIX]`: `{ "docker.io": ["mirror.corp:5000/hub"] }`.
   */
  mirrors?: Readonly<Record<string, readonly string[]>> | undefined;

  /**
   * The most connections used at once, 1 to 64; default 16. Fewer are used where more do not help.
   */
  concurrency?: number | undefined;
  /** Attempts after the first, 0 to 100; default 5. */
  retries?: number | undefined;
  /** How long a connection may be silent, in milliseconds; default 30000. */
  timeoutMs?: number | undefined;
  /** Where proxies, credential files and certificates are looked up; default: `process.env`. */
  environment?: Readonly<Record<string, string | undefined>> | undefined;

  /**
   * Stops everything at once; what is thrown then has the code `ABORTED` and the signal's reason as
   * its cause.
   */
  signal?: AbortSignal | undefined;
  /** Called as bytes arrive. What it throws ends the call, and is thrown from there. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /**
   * Called with a sentence each: a retry, a fallback, a layer that some loaders refuse. What it
   * throws ends the call.
   */
  onWarning?: ((message: string) => void) | undefined;
}

/** What to pull and how. Only `url` is required; the rest has the command's defaults. */
interface PullerOpts extends PullOptions {
  /** The image reference: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. */
  url: string;
}

/** How far one blob is. */
interface BlobProgress {
  digest: string;
  sizeBytes: number;
  doneBytes: number;
}

/** How far a pull is. Bytes are of blobs, before any tar header. */
interface Progress {
  phase: "resolve" | "fetch" | "finish";
  /** Never falls, and equals `totalBytes` at the end. */
  doneBytes: number;
  totalBytes: number;
  /** What came over the line so far, bytes that were fetched again included: for a rate. */
  fetchedBytes: number;
  blobsDone: number;
  blobsTotal: number;
  /** The blobs on their way, in DEST's order. */
  moving: readonly BlobProgress[];
  /** The blob that has just become whole. */
  finished?: BlobProgress;
}

/** What DEST now holds. */
interface PullResult {
  /** The image's name in DEST: `docker.io/library/alpine:3.22`. */
  name: string;
  /** Of the manifest, or of the index where every platform was asked for. */
  digest: string;
  /** `os/architecture[/variant]`, `all`, or empty for what is not an image. */
  platform: string;
  /** How many layers. */
  layers: number;
  /** DEST's size; in a directory, that of the blobs. */
  sizeBytes: number;
  /** What came over the line as blobs: the rest was there already. */
  fetchedBytes: number;
}

/** One image of a pull. */
interface PulledImage {
  /** What was asked for, host and all: `docker.io/library/alpine:3.22`. */
  reference: string;
  /**
   * The same, pinned to the digest that DEST now holds: `docker.io/library/alpine:3.22@sha256:…`.
   */
  pinned: string;
  /** Its name in DEST. */
  name: string;
  /** Of the manifest, or of the index where it was kept. */
  digest: string;
  /** `os/architecture[/variant]`, `all`, or empty for what is not an image. */
  platform: string;
  /** How many layers. */
  layers: number;
}

/** What a pull came to; with `dryRun`, what it would come to. */
interface PullReport {
  /** In the order of the references, each once. */
  images: readonly PulledImage[];
  /** DEST's size; in a directory, that of the blobs. */
  sizeBytes: number;
  /** What came over the line as blobs. */
  fetchedBytes: number;
  /** What was there already: in DEST as it was, or in a tar of `reuse`. */
  reusedBytes: number;
  /** What an earlier run of the same pull had brought. */
  resumedBytes: number;
  /** DEST was already what it had to become, and was left alone. */
  isUnchanged: boolean;
  /** Layers that were left out since the tar of `since` holds them. */
  omitted: readonly Descriptor[];
}

/** A manifest as the registry sent it. */
interface ManifestHolder {
  mediaType: string;
  /** The digest of `bytes`. */
  digest: string;
  /** Exactly what the registry sent. */
  bytes: Uint8Array;
  /** The parsed JSON of `bytes`. */
  manifest: unknown;
  /** The reference that was asked for. */
  imageUrl: string;
}

/**
 * A tar to look at: the path of a file, of a pipe or of an OCI layout folder; or its bytes (Node's
 * Readables are such). It may be compressed.
 */
type TarSource = string | AsyncIterable<Uint8Array>;

/** How a tar is looked at. */
interface LookOptions {
  /** Stops it; what is thrown then has the code `ABORTED` and the signal's reason as its cause. */
  signal?: AbortSignal | undefined;
  /**
   * Called as bytes are read, of the tar as it lies there; how many there are is not known of every
   * stream.
   */
  onProgress?:
    | ((progress: { doneBytes: number; totalBytes: number | undefined }) => void)
    | undefined;
}

interface VerifyOptions extends LookOptions {
  /**
   * Public keys, each as PEM or as the path of a PEM file: SIGNATURE where one of the images is
   * signed by none of them, by what the tar itself holds.
   */
  signedBy?: readonly string[] | undefined;
  /**
   * The path of the tar that this one was made `since`: layers that are missing here are looked for
   * there.
   */
  since?: string | undefined;
}

/** One thing that is wrong with a tar. `entry` is the name of a file in it. */
type TarProblem =
  /** No tar, or not one from some place on: nothing after it was looked at. */
  | { kind: "unreadable"; reason: string }
  /** The blocks that end a tar are not there. */
  | { kind: "cut-off"; atByte: number }
  | { kind: "too-many-entries" }
  | { kind: "too-many-references" }
  /** Programs differ in which of two files they take, */
  | { kind: "name-twice"; entry: string }
  /** in what `..` in a name leads to, */
  | { kind: "step-up"; entry: string }
  /** and in what lies below a link or a file. */
  | { kind: "below-no-folder"; entry: string }
  /** The bytes have another digest than the name says. */
  | { kind: "damaged"; entry: string }
  | { kind: "missing"; entry: string }
  | { kind: "size"; entry: string; expectedBytes: number; actualBytes: number }
  /** A manifest, index or config that is not what it should be. */
  | { kind: "document" | "malformed"; entry: string; reason: string }
  /** An index of which no manifest is here. */
  | { kind: "nothing-here"; entry: string }
  /** A config that has not one diff_id for each layer. */
  | { kind: "diff-ids"; entry: string }
  /** A layer that does not unpack to the diff_id that the config has for it. */
  | { kind: "diff-id"; entry: string; diffId: string }
  | { kind: "unpacks-without-end"; entry: string }
  | { kind: "no-image" };

/** A layer of an image in a tar. */
interface TarLayer {
  /** Or the file's name, where that has none. */
  digest: string;
  /** In bytes. */
  size: number;
  /** A tar made with `since` lacks what its base has. */
  present: boolean;
}

/** An image, or other content, that a tar names. */
interface TarImage {
  /** Empty where it has none. */
  name: string;
  /** The manifest's; empty in docker's older archives, which have none. */
  digest: string;
  /** `os/architecture[/variant]`, or empty. */
  platform: string;
  /** What loaders take for an image: no chart, signature or other artifact. */
  isImage: boolean;
  /** Of the layers. */
  sizeBytes: number;
  layers: TarLayer[];
  /**
   * Where not all the platforms of its index are here: how many are, and how many the index names.
   */
  platforms?: { here: number; named: number };
}

/** Why a program does not load a tar. `entry` is the name of a file in it. */
interface LoaderFault {
  kind:
    | "no-manifest-json"
    | "no-layout"
    /** The tar as a whole: this program wants it plain. */
    | "compressed"
    /** Of its images one at least has no name by which this program finds it. */
    | "no-name"
    | "several"
    | "bad-name"
    /** podman calls the image of a folder after the folder's path. */
    | "folder-name"
    | "same-name"
    /** A delta's base has the layer, but not on top of the same ones. */
    | "not-at-bottom"
    | "no-image"
    | "nested-index"
    | "partial-index"
    | "rooted-names"
    | "link"
    /** It unpacks the tar first, and fails at an entry that it cannot make a file of. */
    | "odd-entry"
    | "odd-link"
    | "windows"
    | "too-many-layers"
    | "encrypted"
    | "no-tar"
    /** A layer has a path twice, or below a link to nothing: docker and podman refuse that, */
    | "path-twice"
    /** or one that cannot be unpacked, such as that of a file below a file. */
    | "odd-path"
    | "trailing-bytes"
    | "label"
    | "packing";
  entry?: string;
  /** Where it lies in that layer. */
  path?: string;
}

/** Whether a program loads a tar. */
interface TarLoader {
  /** The last one is of folders. */
  program:
    | "docker"
    | "podman"
    | "ctr"
    | "skopeo docker-archive"
    | "skopeo oci-archive"
    | "skopeo oci";
  takes: boolean;
  /** The first version that does, where earlier ones do not. */
  sinceVersion?: number;
  /** One image at a time, which must be named. */
  needsName?: boolean;
  /** Empty where it takes it. */
  reasons: LoaderFault[];
}

/** What a tar was found to be. */
interface TarReport {
  images: TarImage[];
  /** Files whose names have digests: all of them were hashed. */
  blobs: number;
  unpackedLayers: number;
  /** Layers that the base has, and this one lacks. */
  baseLayers: number;
  /**
   * Layers that cannot be unpacked here, for each reason: how they are compressed, or `encrypted`.
   */
  notUnpacked: { reason: string; layers: number }[];
  /** Of the indexes that are here: how many of the platforms they name are here too. */
  platforms: { here: number; named: number };
  /**
   * Manifests of these indexes that are not here: platforms that were left out, and their
   * attestations.
   */
  absentManifests: number;
  loaders: TarLoader[];
  problems: TarProblem[];
}

/** What went wrong, for programs: the `code` of an `ImgpullError`. */
type ErrorCode =
  | "BAD_REFERENCE"
  | "BAD_OPTION"
  | "NOT_FOUND"
  | "UNAUTHORIZED"
  | "FORBIDDEN"
  | "RATE_LIMITED"
  | "NO_PLATFORM"
  | "NOT_AN_IMAGE"
  | "UNSUPPORTED"
  | "TOO_LARGE"
  | "DIGEST_MISMATCH"
  | "SIZE_MISMATCH"
  | "SIGNATURE"
  | "PROTOCOL"
  | "NETWORK"
  | "TIMEOUT"
  | "TLS"
  | "CREDENTIALS"
  | "PROXY"
  | "DISK"
  | "BAD_TAR"
  | "ABORTED";

// ====== 3. Errors ======
// One class with a code. The message is what failed, then the request and the registry's words,
// then the remedy.

interface ErrorDetails {
  status?: number | undefined;
  retryAfterMs?: number | undefined;
  report?: TarReport | undefined;
  cause?: unknown;
}

/** The only error thrown on purpose; anything else is a bug. */
class ImgpullError extends Error {
  override readonly name = "ImgpullError";
  readonly code: ErrorCode;
  /** The HTTP status, where there was one. */
  declare readonly status?: number;
  /**
   * What is wrong with a tar, as values, and what is right with it: of `verifyTar()`, with the code
   * `BAD_TAR`.
   */
  declare readonly report?: TarReport;
  /** @internal How long the server asks us to stay away. */
  declare readonly retryAfterMs?: number;

  constructor(
    code: ErrorCode,
    message: string,
    details: { status?: number | undefined; cause?: unknown } = {},
  ) {
    const { cause, status, retryAfterMs, report }: ErrorDetails = details;
    super(message, cause === undefined ? undefined : { cause });
    this.code = code;
    if (status !== undefined) this.status = status;
    if (retryAfterMs !== undefined) this.retryAfterMs = retryAfterMs;
    if (report !== undefined) this.report = report;
  }
}

function fail(code: ErrorCode, message: string, details?: ErrorDetails): never {
  throw new ImgpullError(code, message, details);
}

/** What was asked to stop has stopped. */
const stopped = (cause?: unknown): never => fail("ABORTED", "stopped", { cause });

/** Node's code of an error (`ECONNRESET`, `ENOENT`), or nothing. */
const errorCodeOf = (error: unknown): string =>
  String((error as { code?: unknown } | undefined)?.code ?? "");

/** How many pairs of neighbouring letters two words share. */
const likeness = (left: string, right: string): number =>
  [...`^${left}`].filter((letter, at) => `^${right}$`.includes(letter + (left[at] ?? "$"))).length;

/** The name that was probably meant. */
function nearestName(word: string, names: readonly string[]): string | undefined {
  const isLike = (name: string) => likeness(word, name) >= 0.4 * (word.length + 1);
  return names
    .filter(isLike)
    .sort((left, right) => likeness(word, right) - likeness(word, left))[0];
}

// ------ Words from outside ------

// C0, DEL, C1, and the bidirectional and line controls that reorder what a person reads.
const CONTROL_CHARACTERS =
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what it is about
  /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g;

/** What a message says before its remedy, and before the next failure. */
const firstLineOf = (message: string): string => message.split("\n")[0] ?? "";

/**
 * Text from outside, fit for a terminal: no control characters or escapes, no line breaks, bounded.
 */
const printable = (text: string, maximum?: number): string => unmarked(outside(text, maximum));

const OUTSIDE = /\u2068(\d+) ([^\u2069]*)\u2069/g;

/**
 * What a server says, within a sentence of ours: between marks, until the sentence leaves. Only
 * then secrets are struck out of it, however short (of our own words, a short password may be one),
 * and after that it is cut to length.
 */
const outside = (text: string, maximum = 300): string =>
  `\u2068${maximum} ${text.replace(CONTROL_CHARACTERS, " ").trim()}\u2069`;

/** A sentence without the marks, and with what `strike` leaves of the words between them. */
function unmarked(sentence: string, strike = (words: string) => words): string {
  return sentence.replace(OUTSIDE, (_all, maximum: string, words: string) => {
    const shown = strike(words);
    const length = Number(maximum);
    return shown.length > length ? `${shown.slice(0, length)}…` : shown;
  });
}

/** A URL that a server has named: a redirect's, a token service's, the next page's. */
class ForeignUrl extends URL {}

/**
 * A URL without user, password and query (which may be a signature); `?ns=` is ours and is kept.
 * Parameters within the path (`;sig=…`) go the same way.
 */
function redactUrl(url: URL): string {
  const { protocol, host, pathname, searchParams } = url;
  const place = `${host}${pathname.replace(/(;|%3b|%3f).*$/i, "$1***")}`;
  const scheme = /^https?:$/.test(protocol) ? protocol : outside(protocol);
  if (url instanceof ForeignUrl) return `${scheme}//${outside(place)}`;

  const namespace = searchParams.get("ns");
  const query = namespace === null ? "" : `?ns=${namespace}`;
  return printable(`${protocol}//${place}${query}`);
}

/**
 * An image reference or place as it was typed: what stands before an @ that is no digest's may be a
 * password.
 */
const withoutUser = (text: string): string => text.replace(/^.*@(?!sha(256|512):)/s, "***@");

// ------ Secrets ------

/**
 * Parts of a Base64 text that has `secret` in it, one for each place where it may begin among
 * groups of three bytes.
 */
function base64Forms(secret: string): string[] {
  const forms = [0, 1, 2].map((shift) => {
    const bytes = Buffer.from(" ".repeat(shift) + secret);
    const text = bytes.toString("base64").replace(/=+$/, "");
    const isOpen = bytes.length % 3 > 0; // then the last digit depends on what follows
    return text.slice(shift === 0 ? 0 : shift + 1, isOpen ? -1 : undefined);
  });
  const forUrls = forms.map((form) => form.replaceAll("+", "-").replaceAll("/", "_"));
  return [...forms, ...forUrls, ...forms.map(encodeURIComponent)];
}

/** A secret in each form in which whoever was shown it may say it. */
function formsOf(secret: string): string[] {
  const text = Buffer.from(secret).toString("utf8"); // well-formed, as encodeURIComponent wants it
  const percent = encodeURIComponent(text);
  const strict = percent.replace(/[!'()*~.-]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
  const inForms = percent.replaceAll("%20", "+");
  const percents = [percent, strict, inForms].flatMap((form) => [
    form,
    form.replace(/%../g, (digits) => digits.toLowerCase()),
    form.replace(/%../g, (digits) => digits.toUpperCase()),
  ]);
  const inJson = JSON.stringify(text).slice(1, -1);
  const inHtml = text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");
  return [text, inJson, inHtml, ...percents, ...base64Forms(text)];
}

/** Whoever wrote it: a digest may be a registry's word, and stands in requests that are ours. */
const DIGEST_IN_WORDS = /sha(256|512):[0-9a-f]+/g;

/**
 * What no output may have: passwords, tokens, signatures. Whoever gets to know one adds it; whoever
 * shows words from outside has them struck out first, before they are cut to length.
 */
class Secrets {
  readonly #secrets = new Set<string>();
  readonly #forms = new Set<string>();
  // the last ones: each request for a blob may be redirected to new ones
  readonly #signatures: string[] = [];
  #patterns: { inWords: RegExp; anywhere: RegExp } | undefined; // made when they are next needed

  add(...secrets: readonly (string | undefined)[]): void {
    for (const secret of secrets) {
      if (!secret || this.#secrets.has(secret)) continue;
      this.#secrets.add(secret);
      for (const form of formsOf(secret)) this.#forms.add(form);
      this.#patterns = undefined;
    }
  }

  /** Values of a signed URL's query that sign it or identify its signer. */
  addSigned({ searchParams }: URL): void {
    for (const [name, value] of searchParams)
      if (/sig|token|cred|secret|key|auth|policy/i.test(name)) this.#signatures.push(value);
    this.#signatures.splice(0, this.#signatures.length - LIMITS.signaturesKept);
    this.#patterns = undefined;
  }

  /** Words that someone else has chosen: queries of URLs go too, since they may be signatures. */
  strikeWords(text: string): string {
    const struck = text.replace(this.#compile().inWords, "***");
    return struck.replace(/([?&;][\w.~%-]+=)[^\s&;"'<>)]+/g, "$1***");
  }

  /**
   * A sentence of ours as it leaves. In our own words a short password could be a common one: they
   * are searched for long ones only, and for short ones what is from outside.
   */
  strike(sentence: string): string {
    const { inWords, anywhere } = this.#compile();
    return unmarked(sentence, (words) => this.strikeWords(words))
      .replace(DIGEST_IN_WORDS, (digest) => digest.replace(inWords, "***"))
      .replace(anywhere, "***");
  }

  /** An error and its causes, which programs log whole. */
  strikeError(error: unknown): void {
    const seen = new Set<unknown>();
    for (let each = error; each instanceof Error && !seen.has(each); each = each.cause) {
      seen.add(each);
      const isOurs = each instanceof ImgpullError;
      // Node's have the host besides, which may be a redirect's.
      const texts = each as unknown as Record<string, unknown>;
      for (const name of ["message", "stack", "hostname", "host"]) {
        const text = texts[name];
        if (typeof text !== "string") continue;
        const struck = isOurs ? this.strike(text) : this.strikeWords(text);
        if (struck !== text) texts[name] = struck;
      }
    }
  }

  #compile() {
    if (this.#patterns) return this.#patterns;

    const forms = new Set([...this.#forms, ...this.#signatures.flatMap(formsOf)]);
    const inWords = anyOf(forms, LIMITS.secretLength);
    const anywhere = anyOf(forms, 2 * LIMITS.secretLength);
    this.#patterns = { inWords, anywhere };
    return this.#patterns;
  }
}

/**
 * Matches each of these texts that is long enough, the longest first; nothing where there is none.
 */
function anyOf(texts: Iterable<string>, leastLength: number): RegExp {
  const patterns = [...texts]
    .filter(({ length }) => length >= leastLength)
    .sort((left, right) => right.length - left.length)
    .map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  return new RegExp(patterns.join("|") || "(?!)", "g");
}

// ------ Connections ------

/** What a pattern in Node's code and words means; without words of our own, Node's are shown. */
interface ConnectionFault {
  readonly pattern: RegExp;
  readonly code: ErrorCode;
  readonly words?: string | ((error: ConnectionCause) => string);
  readonly remedy?: string;
}

/** What Node's errors may have besides. */
interface ConnectionCause extends NodeJS.ErrnoException {
  readonly errors?: readonly Error[];
  readonly host?: string;
  readonly hostname?: string;
  readonly address?: string;
  readonly cert?: { readonly subjectaltname?: string };
}

/**
 * Which names and addresses a certificate is for: `DNS:a.example, IP Address:10.0.0.1` in Node's
 * words.
 */
function certificateNames({ host = "", cert }: ConnectionCause): string {
  const names = (cert?.subjectaltname ?? "")
    .split(", ")
    .map((name) => name.replace(/^(DNS|IP Address):/, ""))
    .filter(Boolean);
  const listed = names.slice(0, 8).join(", ") + (names.length > 8 ? " …" : "");
  const named = names.length > 0 ? outside(listed) : "no name at all";
  return `its certificate is not for ${outside(host)} but for ${named}`;
}

const CLIENT_CERTIFICATE_REMEDY =
  "it may want a client certificate, one that it knows: `tlsCert` and `tlsKey`";

/**
 * An https client that meets plain HTTP reads "HTTP/1.1" as a TLS record of an absurd version or
 * length.
 */
const PLAIN_HTTP =
  /wrong version number|packet length too long|unknown protocol|record layer failure/i;

/** The first that fits counts. */
const CONNECTION_FAULTS: readonly ConnectionFault[] = [
  {
    pattern: PLAIN_HTTP,
    code: "TLS",
    words: "the server answers plain HTTP on this port",
    remedy: "try `scheme` http",
  },
  {
    pattern: /^(UNABLE_TO|SELF_SIGNED|DEPTH_ZERO)/,
    code: "TLS",
    remedy:
      "its certificate authority is not known here: `caCert` gives it, `insecure` goes without",
  },
  {
    pattern: /^ERR_TLS_CERT_ALTNAME_INVALID/,
    code: "TLS",
    words: certificateNames,
    remedy: "use a name that it is for; `insecure` goes without the check",
  },
  {
    // The alerts with which a server refuses a certificate of ours, or the lack of one.
    pattern:
      /certificate required|bad certificate|handshake failure|alert (unknown ca|certificate (unknown|expired|revoked)|access denied|unsupported certificate)/i,
    code: "TLS",
    remedy: CLIENT_CERTIFICATE_REMEDY,
  },
  { pattern: /^(CERT_|INVALID_|ERR_TLS|ERR_SSL|EPROTO)/, code: "TLS" },
  {
    // Node refuses it even where it is lenient, since proxies and servers have been tricked that
    // way.
    pattern: /^HPE_(UNEXPECTED_CONTENT_LENGTH|INVALID_CONTENT_LENGTH)/,
    code: "PROTOCOL",
    words: "the answer tells its length twice, or in no number (Content-Length): refused",
  },
  {
    pattern: /^HPE_HEADER_OVERFLOW/,
    code: "PROTOCOL",
    words: `the answer's headers are larger than ${LIMITS.headerBytes} bytes`,
  },
  {
    pattern: /^HPE_INVALID_HEADER_TOKEN/,
    code: "PROTOCOL",
    words: "a header line of the answer is malformed",
  },
  {
    pattern: /^HPE_(INVALID_CONSTANT|INVALID_VERSION|INVALID_STATUS)/,
    code: "PROTOCOL",
    words: "what answers there does not speak HTTP/1.1",
  },
  { pattern: /^ENOTFOUND/, code: "NETWORK", words: "no such host" },
  {
    pattern: /^EAI_AGAIN/,
    code: "NETWORK",
    words: "no name server answers",
    remedy: "is this machine connected, and its name server the right one?",
  },
  { pattern: /^ECONNRESET/, code: "NETWORK", words: "connection lost" },
  { pattern: /^ECONNREFUSED/, code: "NETWORK", words: "connection refused" },
];
const OTHER_CONNECTION_FAULT: ConnectionFault = { pattern: /^/, code: "NETWORK" };

/** What Node says of a connection that failed, in our codes, with the remedy where one is known. */
function connectionError(error: unknown, doing: string): ImgpullError {
  if (error instanceof ImgpullError) return error;

  const cause = error as ConnectionCause;
  if (cause.name === "AbortError") return new ImgpullError("ABORTED", "stopped", { cause });

  const nodeCode = errorCodeOf(error);
  // Where a host has several addresses, the message is empty and there is an error for each
  // address.
  const nodeWords = printable(cause.message || cause.errors?.[0]?.message || nodeCode);
  const fault =
    CONNECTION_FAULTS.find(({ pattern }) => pattern.test(`${nodeCode} ${nodeWords}`)) ??
    OTHER_CONNECTION_FAULT;
  const host = cause.hostname ?? cause.address; // it may be a redirect's
  const ownWords = host ? nodeWords.replaceAll(host, () => outside(host)) : nodeWords;

  const { code, words = ownWords, remedy } = fault;
  const said = typeof words === "string" ? words : words(cause);
  const advice = remedy === undefined ? "" : `\n  ${remedy}`;
  return new ImgpullError(code, `${doing}: ${said}${advice}`, { cause });
}

// ------ Files ------

const DISK_WORDS: Readonly<Record<string, string>> = {
  ENOSPC: "the disk is full",
  EDQUOT: "the disk quota is used up",
  EROFS: "the file system is read-only",
  EACCES: "permission denied",
  EPERM: "permission denied",
  ERR_ACCESS_DENIED: "not allowed by Node's permission model",
  ENOENT: "no such file or directory",
  ENOTDIR: "a part of the path is not a directory",
  EISDIR: "it is a directory",
  EPIPE: "who reads it has gone before its end",
  ELOOP: "it is a loop of links",
  NO_INODES: "the file system has no inodes left: it holds too many files",
  EFBIG: "the file system does not take a file of that size",
  ENAMETOOLONG: "a name in the path is too long",
};

const diskWords = (error: unknown): string =>
  DISK_WORDS[errorCodeOf(error)] ?? printable((error as Error).message);

/**
 * Waits for work on files; what the system refuses becomes a DISK error that says which and why.
 */
function onDisk<T>(doing: string, work: Promise<T>): Promise<T> {
  return work.catch((error: NodeJS.ErrnoException) => {
    const isRefusal = error.syscall !== undefined || errorCodeOf(error) === "ERR_ACCESS_DENIED";
    if (!isRefusal) throw error;
    return fail("DISK", `${doing}: ${diskWords(error)}`, { cause: error });
  });
}

// ====== 4. Primitives ======
// Digests, JSON from outside, words, work side by side. Nothing here knows of a registry.

const ignore = (): undefined => undefined;

// ------ Digests ------

/**
 * A digest is checked here before it touches a path or a URL: algorithm known, lower-case hex,
 * exact length.
 */
const isDigest = (text: unknown): text is string =>
  typeof text === "string" && /^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(text);

const algorithmOf = (digest: string): string => digest.slice(0, digest.indexOf(":"));

const hexOf = (digest: string): string => digest.slice(digest.indexOf(":") + 1);

/** A hash of the algorithm that a digest names. */
const newHash = (digest: string): Hash => load("node:crypto").createHash(algorithmOf(digest));

/** The digest of bytes, by the algorithm of another digest. */
const digestOf = (bytes: Uint8Array, like = "sha256:"): string =>
  `${algorithmOf(like)}:${newHash(like).update(bytes).digest("hex")}`;

// ------ JSON and objects ------

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const isStringList = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((each) => typeof each === "string");

const encodeJson = (value: unknown): Buffer => Buffer.from(JSON.stringify(value), "utf8");

/**
 * Undefined where it is not JSON, without the parser's words: they quote the text, which may be a
 * secret.
 */
function parseJson(text: string | Buffer): unknown {
  try {
    return JSON.parse(String(text)) as unknown;
  } catch {
    return undefined;
  }
}

const QUOTE = 0x22;
const COMMA = 0x2c;
const OPEN_BRACKET = 0x5b;
const BACKSLASH = 0x5c;
const CLOSE_BRACKET = 0x5d;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;

/**
 * Where a string of a JSON text, which begins at `start`, has its closing quote; beyond the text if
 * it has none.
 */
function endOfString(json: Buffer, start: number): number {
  let at = start + 1;
  while (at < json.length && json[at] !== QUOTE) at += json[at] === BACKSLASH ? 2 : 1;
  return at;
}

/** JSON of few enough values, and not nested so deep that reading it costs more than its size. */
function parseShallowJson(json: Buffer, maximumValues: number = LIMITS.jsonValues): unknown {
  let depth = 0;
  let values = 0;
  for (let at = 0; at < json.length; at += 1) {
    const byte = json[at];
    if (byte === QUOTE) at = endOfString(json, at);
    if (byte === OPEN_BRACE || byte === OPEN_BRACKET) depth += 1;
    if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) depth -= 1;
    if (byte === COMMA) values += 1;
    if (depth > LIMITS.jsonDepth || values > maximumValues) return undefined;
  }
  return parseJson(json);
}

/** The fields that have a value: what is undefined or an empty string is left out. */
const dropEmpty = <T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } =>
  Object.fromEntries(
    Object.entries(values).filter(([, value]) => value !== undefined && value !== ""),
  ) as never;

const sumOf = <T>(items: Iterable<T>, numberOf: (item: T) => number): number => {
  let sum = 0;
  for (const item of items) sum += numberOf(item);
  return sum;
};

// ------ Words ------

/** `999 B`, `1.2 MB`, `340 GB`: three digits or fewer. */
function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = "B";
  for (const larger of ["kB", "MB", "GB", "TB"]) {
    if (value < 999.5) break;
    value /= 1000;
    unit = larger;
  }

  const isWhole = unit === "B" || value >= 99.95;
  return `${isWhole ? Math.round(value) : value.toFixed(1)} ${unit}`;
}

/** `1 layer`, `2 layers`. */
const counted = (count: number, noun: string): string =>
  `${count} ${noun}${count === 1 ? "" : "s"}`;

const formatPlatform = ({ os: system, architecture, variant }: Partial<Platform> = {}): string =>
  [system, architecture, variant].filter(Boolean).join("/");

// ------ Side by side ------

/**
 * Runs at most `limit` at once, keeps the order, and lets every one end before what failed is
 * thrown.
 */
async function mapConcurrently<T, R>(
  items: readonly T[],
  limit: number,
  run: (item: T) => Promise<R>,
): Promise<R[]> {
  const results: PromiseSettledResult<R>[] = [];
  const queue = items.entries(); // all lanes take from it

  const runLane = async () => {
    for (const [index, item] of queue) {
      const [result] = await Promise.allSettled([run(item)]);
      results[index] = result;
    }
  };
  await Promise.all(Array.from({ length: limit }, runLane));

  return settled(results);
}

/** The values of all, in order; where some failed, one error for all of them is thrown. */
function settled<R>(results: readonly PromiseSettledResult<R>[]): R[] {
  const values: R[] = [];
  const failures: unknown[] = [];
  for (const result of results) {
    if (result.status === "fulfilled") values.push(result.value);
    else failures.push(result.reason);
  }

  if (failures.length > 0) throw asOneFailure(failures);
  return values;
}

/**
 * Several failures as one error that names each, so that a list is mended in one go. Bugs go first,
 * as they are.
 */
function asOneFailure(failures: readonly unknown[]): unknown {
  const errors = failures.filter((failure) => failure instanceof ImgpullError);
  if (errors.length < failures.length)
    return failures.find((failure) => !(failure instanceof ImgpullError));

  // The others were only stopped because the first had failed.
  const telling = errors.filter(({ code }) => code !== "ABORTED");
  const [first] = telling;
  if (!first) return errors[0];

  const messages = [...new Set(telling.map(({ message }) => message))];
  if (messages.length === 1) return first;
  return new ImgpullError(first.code, messages.join("\n"), { status: first.status, cause: first });
}

/**
 * Aborts with the first of them. That many requests listen to it is no leak, whatever Node warns.
 */
function anySignal(...signals: AbortSignal[]): AbortSignal {
  const signal = AbortSignal.any(signals);
  setMaxListeners(0, signal);
  return signal;
}

// ====== 5. References ======
// The grammar of the distribution specification ("Pulling manifests") and of docker's reference
// package:
//
//   reference  = [host "/"] repository [":" tag] ["@" digest]
//   host       = (label *("." label) | "[" IPv6 "]") [":" port]     docker.io where there is none
//   repository = component *("/" component)                         lower case
//   component  = alphanumerics, parted by one ".", one or two "_", or any number of "-"

/**
 * An image reference in its parts. `host` is the name that people use (`docker.io`), not where its
 * API is.
 */
interface Reference {
  readonly host: string;
  readonly repository: string;
  readonly tag?: string;
  readonly digest?: string;
}

/** Docker Hub by its three names; the first is what people read, the last is where its API is. */
const HUB_HOSTS = ["docker.io", "index.docker.io", "registry-1.docker.io"];

const LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?";
const HOST_NAME = `${LABEL}(?:\\.${LABEL})*`;
const HOST = new RegExp(`^(?:${HOST_NAME}|\\[(?<ipv6>[0-9a-fA-F:.]+)\\])(?::(?<port>\\d{1,5}))?$`);
const COMPONENT = "[a-z0-9]+(?:(?:\\.|_{1,2}|-+)[a-z0-9]+)*";
const REPOSITORY = new RegExp(`^${COMPONENT}(?:/${COMPONENT})*$`);
const TAG = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/;

/**
 * Cuts without judging: a first segment with a dot or a port is a host; a tag follows the last
 * colon of the rest.
 */
const PARTS = /^(?:(?<host>localhost|[^/]*[.:][^/]*)\/)?(?<name>.*?)(?::(?<tag>[^:]*))?$/;

function isHost(text: string): boolean {
  const match = HOST.exec(text);
  if (!match) return false;

  const { ipv6, port = "443" } = match.groups ?? {};
  if (Number(port) < 1 || Number(port) > 65535) return false;
  if (ipv6 !== undefined && !net.isIPv6(ipv6)) return false;
  return URL.canParse(`http://${text}`); // which refuses more: 10.0.0.256, punycode that is none
}

/** Cuts a text as the grammar has it, without judging the parts. */
function splitReference(text: string) {
  const [place = "", digest] = text.split("@");
  const { host = "docker.io", name = "", tag } = PARTS.exec(place)?.groups ?? {};
  const isHub = canonicalHost(host) === "docker.io";
  return {
    host: isHub ? "docker.io" : host,
    repository: isHub && !name.includes("/") ? `library/${name}` : name,
    name,
    tag,
    digest,
  };
}

/** Why a text is no reference; undefined where it is one. */
function faultOfReference(text: string): string | undefined {
  if (text === "") return "it is empty";
  if (/^[a-z]+:\/\//i.test(text)) return "write it without the scheme (use `scheme` for http)";
  if (text.includes(" ")) return "it has a space, a character that no reference has";
  if (/[^\x21-\x7e]/.test(text)) return "it has a character that is not printable ASCII";
  if (text.split("@").length > 2) return "it has more than one @";

  const { host, repository, name, tag, digest } = splitReference(text);
  if (digest !== undefined && !isDigest(digest)) {
    const form = "sha256: and 64, or sha512: and 128 lower-case hex digits";
    return `"${printable(digest)}" is not a digest: ${form}`;
  }
  if (!isHost(host)) return `"${host}" is not a host, host:port or [IPv6 address]`;
  if (name === "") return "the repository is missing";
  if (name !== name.toLowerCase()) return "a repository is written in lower case";
  if (!REPOSITORY.test(name)) return `"${name}" is not a repository name`;
  if (tag === "") return "the tag behind the : is empty";
  if (tag !== undefined && !TAG.test(tag)) return `"${tag}" is not a tag`;
  if (`${host}/${repository}`.length > 255)
    return "host and repository are longer than 255 characters";
  return undefined;
}

const isReference = (text: string): boolean => faultOfReference(text) === undefined;

/**
 * Throws BAD_REFERENCE with the reason; nothing is asked of any registry for a reference that
 * cannot be right.
 */
function parseReference(text: string): Reference {
  const fault = faultOfReference(text);
  if (fault !== undefined) {
    fail("BAD_REFERENCE", `bad image reference "${printable(withoutUser(text))}": ${fault}`);
  }

  const { host, repository, tag, digest } = splitReference(text);
  const defaultTag = digest === undefined ? "latest" : undefined;
  return { host, repository, ...dropEmpty({ tag: tag ?? defaultTag, digest }) };
}

/** A reference without its version. */
const placeOf = ({ host, repository }: Pick<Reference, "host" | "repository">): string =>
  `${host}/${repository}`;

function formatReference({ tag, digest, ...place }: Reference): string {
  const tagPart = tag === undefined ? "" : `:${tag}`;
  const digestPart = digest === undefined ? "" : `@${digest}`;
  return `${placeOf(place)}${tagPart}${digestPart}`;
}

const apiHost = (host: string): string => (host === "docker.io" ? "registry-1.docker.io" : host);

/**
 * The name an image gets in the tar. A mirror stands for another registry, told by --ns or by the
 * path's first segment; the tag names, and only a reference without one is named by its digest.
 */
function imageName({ host, repository, tag, digest }: Reference, namespace?: string): Reference {
  const version = tag === undefined ? `@${digest}` : `:${tag}`;
  if (namespace !== undefined) return parseReference(`${namespace}/${repository}${version}`);

  const [firstSegment = "", ...others] = repository.split("/");
  const isMirrored = others.length > 0 && firstSegment.includes(".") && isHost(firstSegment);
  return parseReference(`${isMirrored ? "" : `${host}/`}${repository}${version}`);
}

/** `NAME-TAG.tar`, in the working directory. */
function defaultDestination({ repository, tag, digest = "" }: Reference): string {
  const name = repository.slice(repository.lastIndexOf("/") + 1);
  return `${name}-${tag ?? hexOf(digest).slice(0, 12)}.tar`;
}

/** A place that has what a registry has, perhaps below a prefix. */
interface Mirror {
  readonly scheme: "https" | "http";
  readonly host: string;
  readonly prefix: string;
}

const canonicalHost = (host: string): string =>
  HUB_HOSTS.includes(host.toLowerCase()) ? "docker.io" : host.toLowerCase();

/** The mirrors of each host, in their order. */
function parseMirrors(
  mirrors: Readonly<Record<string, readonly string[]>>,
  scheme: "https" | "http",
): Map<string, readonly Mirror[]> {
  const parsed = new Map<string, readonly Mirror[]>();
  for (const [host, places] of Object.entries(mirrors)) {
    if (!isHost(host)) fail("BAD_OPTION", `\`mirrors\`: "${printable(host)}" is not a host`);
    const key = canonicalHost(host);
    const added = places.map((place) => parseMirror(place, scheme));
    parsed.set(key, [...(parsed.get(key) ?? []), ...added]);
  }
  return parsed;
}

/** `[http[s]://]HOST[:PORT][/PREFIX]` */
function parseMirror(text: string, scheme: "https" | "http"): Mirror {
  const parts = /^(?:(https?):\/\/)?([^/]*)(?:\/(.*?))?\/?$/i.exec(text) ?? [];
  const [, written = scheme, host = "", prefix = ""] = parts;
  const isPlace = isHost(host) && (prefix === "" || REPOSITORY.test(prefix));
  if (isPlace) return { scheme: written.toLowerCase() === "http" ? "http" : "https", host, prefix };

  const shown = printable(withoutUser(text));
  return fail("BAD_OPTION", `\`mirrors\`: "${shown}" is not HOST[:PORT][/PREFIX]`);
}

// ====== 6. Transport ======
// One request: certificates, proxy, silence, redirects. It knows no registry and keeps no bytes.
// Invariant: an Authorization header and a client certificate are chosen anew for each origin,
// never carried over.

/** @internal */
type Environment = Readonly<Record<string, string | undefined>>;

/** What a pull was told, checked. `certsDirectory` is /etc/docker/certs.d, but for tests. */
type Settings = Readonly<
  Pick<PullOptions, "tlsCert" | "tlsKey" | "caCert" | "username" | "password" | "token"> &
    Pick<PullOptions, "insecure" | "namespace"> & {
      scheme: "https" | "http";
      concurrency: number;
      retries: number;
      timeoutMs: number;
      wanted: Partial<Platform>;
      mirrors: ReadonlyMap<string, readonly Mirror[]>; // by the host that they mirror
      environment: Environment;
      certsDirectory: string;
    }
>;

/**
 * A registry is shown the client certificate, and what certs.d has for it; a mirror the latter; no
 * other either.
 */
type Role = "registry" | "mirror" | "other";

/** A request as its maker sees it. */
interface HttpRequest {
  readonly method: string;
  readonly url: URL;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: string;
  readonly signal: AbortSignal;
  /**
   * The body is a blob's: it may take as long as it moves. Everything else has to be whole in time.
   */
  readonly isBlob?: boolean;
  /** Where a redirect may lead; without it, anywhere that is as private. */
  readonly mayAsk?: (url: URL) => boolean;
  /** The Authorization header for an origin; asked anew at each redirect. */
  readonly authorizationFor: (origin: string) => Promise<string | undefined>;
  readonly roleOf: (origin: string) => Role;
}

/** What a server answered. A body is there on success only; otherwise its words were read. */
interface Answer {
  readonly status: number;
  readonly headers: http.IncomingHttpHeaders;
  /** Who answered: after redirects, not the one who was asked. */
  readonly url: URL;
  /** Of another host, by a URL that is good for a while: no cache has a use for that. */
  readonly isElsewhere: boolean;
  /** The Authorization header that it was shown. */
  readonly authorization: string | undefined;
  readonly body?: http.IncomingMessage;
  readonly words: string;
  /** From when the request had a connection to the headers of what answered it. */
  readonly waitedMs: number;
}

/**
 * For every request, CONNECT included. Peers take what Node's strict parser refuses (a length
 * beside chunks, LF alone, folded lines, control characters), and digests guard the bytes. Each
 * address of a host is given seconds: Node's own 250 ms are less than a slow line's round trip.
 */
const SOCKET_OPTIONS = {
  insecureHTTPParser: true,
  maxHeaderSize: LIMITS.headerBytes,
  autoSelectFamilyAttemptTimeout: TUNING.addressMs,
};

const clientFor = ({ protocol }: URL) => load(protocol === "https:" ? "node:https" : "node:http");

const basicAuthorization = (username: string, secret: string): string =>
  `Basic ${Buffer.from(`${username}:${secret}`, "utf8").toString("base64")}`;

/** Retry-After is seconds or a date (RFC 9110 §10.2.3); undefined where it is neither. */
function parseRetryAfter(value: string | undefined, now: number): number | undefined {
  if (value === undefined) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000;
  if (!/[a-z]/i.test(value)) return undefined; // "1.5" would be a day in 2001

  const date = Date.parse(value);
  return Number.isNaN(date) ? undefined : Math.max(0, date - now);
}

// ------ Certificates ------

/**
 * Where the distributions keep their certificates, in the order in which Go's crypto/x509 looks
 * (root_linux.go).
 */
const CA_BUNDLES = [
  "/etc/ssl/certs/ca-certificates.crt",
  "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem",
  "/etc/pki/tls/cacert.pem",
  "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
  "/etc/ssl/cert.pem",
  "/usr/local/etc/ssl/cert.pem",
  "/usr/local/share/certs/ca-root-nss.crt",
  "/etc/openssl/certs/ca-certificates.crt",
];
const CA_DIRECTORIES = ["/etc/ssl/certs", "/etc/pki/tls/certs", "/system/etc/security/cacerts"];

const readOptional = (file: string): Promise<string | undefined> =>
  fs.readFile(file, "utf8").catch(ignore);

/** The names in a folder, sorted; none where it cannot be read. */
const listOptional = async (folder: string): Promise<string[]> =>
  (await fs.readdir(folder).catch(() => [])).sort();

/**
 * The certificates of a PEM text, one by one: in a whole text OpenSSL stops at the first that it
 * cannot read.
 */
const certificatesOf = (text = ""): string[] =>
  text
    .split(/(?=-----BEGIN )/)
    .filter((block) => /^-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----/.test(block));

function isReadable(certificate: string): boolean {
  const { X509Certificate } = load("node:crypto");
  try {
    return new X509Certificate(certificate).serialNumber !== "";
  } catch {
    return false;
  }
}

/**
 * The system's certificate store, as Go reads it; Node's own roots only where the system has none.
 */
async function systemCertificates(environment: Environment): Promise<string[]> {
  const { SSL_CERT_FILE, SSL_CERT_DIR, NODE_EXTRA_CA_CERTS } = environment;
  const found = new Set<string>();
  const add = (...texts: readonly (string | undefined)[]) => {
    for (const each of texts.flatMap(certificatesOf)) found.add(each);
  };

  for (const file of SSL_CERT_FILE ? [SSL_CERT_FILE] : CA_BUNDLES) {
    add(await readOptional(file));
    if (found.size > 0) break;
  }

  const defaultDirectories = found.size > 0 ? [] : CA_DIRECTORIES;
  for (const directory of SSL_CERT_DIR?.split(path.delimiter) ?? defaultDirectories) {
    const names = await listOptional(directory);
    add(...(await Promise.all(names.map((name) => readOptional(path.join(directory, name))))));
  }

  if (found.size === 0) add(...nodeCertificates());
  if (NODE_EXTRA_CA_CERTS) add(await readOptional(NODE_EXTRA_CA_CERTS));
  return [...found];
}

/**
 * macOS and Windows keep theirs in no file; Node reads them since 22.15. Elsewhere, or before that,
 * Node's own roots.
 */
function nodeCertificates(): readonly string[] {
  const { getCACertificates, rootCertificates = [] }: Partial<typeof tls> = load("node:tls");
  const isKeptByTheSystem = ["darwin", "win32"].includes(process.platform);
  const system = isKeptByTheSystem ? (getCACertificates?.("system") ?? []) : [];
  return system.length > 0 ? system : rootCertificates;
}

/** What a user has named must be there and be PEM. `what` is the option or the kind of file. */
async function readPem(what: string, file: string): Promise<string> {
  const text = await fs
    .readFile(file, "utf8")
    .catch((error: unknown) => fail("TLS", `cannot read ${what} ${file}: ${diskWords(error)}`));
  if (!text.includes("-----BEGIN ")) fail("TLS", `${what} ${file} is not a PEM file`);
  return text;
}

/** At least one certificate of those that a user has named must be readable. */
async function readAuthorities(what: string, file: string): Promise<string[]> {
  const certificates = certificatesOf(await readPem(what, file)).filter(isReadable);
  if (certificates.length === 0) fail("TLS", `${what} ${file} has no certificate that can be read`);
  return certificates;
}

async function readKey(what: string, file: string): Promise<string> {
  const text = await readPem(what, file);
  const isEncrypted = /-----BEGIN ENCRYPTED|^Proc-Type: 4,ENCRYPTED/m.test(text);
  if (isEncrypted)
    fail(
      "TLS",
      `${what} ${file} has a passphrase\n  give it without one: openssl pkey -in FILE -out NEW`,
    );
  return text;
}

interface OwnCertificates {
  readonly ca: readonly string[];
  readonly cert: readonly string[];
  readonly key: readonly string[];
}

/** What folders of /etc/docker/certs.d have for a host, as docker's documentation has it. */
async function readCertsFolders(folders: readonly string[]): Promise<OwnCertificates> {
  const files: string[] = [];
  for (const folder of folders)
    files.push(...(await listOptional(folder)).map((name) => path.join(folder, name)));

  const readAll = <T>(suffix: string, read: (what: string, file: string) => Promise<T>) =>
    files.filter((file) => file.endsWith(suffix)).map((file) => read("certificate", file));

  // An authority that cannot be read hides no other.
  const authorities = await Promise.allSettled(readAll(".crt", readAuthorities));
  const readable = authorities.filter(({ status }) => status === "fulfilled");
  return {
    ca: settled(readable.length > 0 ? readable : authorities).flat(),
    cert: await Promise.all(readAll(".cert", readPem)),
    key: await Promise.all(readAll(".key", readKey)),
  };
}

/** Whom a peer must be known to, and for the registry what we show it. */
async function makeSecureContext(
  { caCert, tlsCert, tlsKey, environment }: Settings,
  registryFolders?: readonly string[],
): Promise<tls.SecureContext> {
  const ca = await systemCertificates(environment);
  if (caCert !== undefined) ca.push(...(await readAuthorities("`caCert`", caCert)));

  let cert: string[] = [];
  let key: string[] = [];
  if (registryFolders !== undefined) {
    const own = await readCertsFolders(registryFolders);
    ca.push(...own.ca);
    cert = tlsCert === undefined ? [...own.cert] : [await readPem("`tlsCert`", tlsCert)];
    key = tlsKey === undefined ? [...own.key] : [await readKey("`tlsKey`", tlsKey)];
  }

  try {
    return load("node:tls").createSecureContext({
      ca,
      cert,
      key,
      // As in Go: an intermediate or the server's own certificate is trust enough, and a server
      // that does not know RFC 5746 (secure renegotiation) is spoken to, since nothing here
      // renegotiates.
      allowPartialTrustChain: true,
      secureOptions: load("node:crypto").constants.SSL_OP_LEGACY_SERVER_CONNECT,
    });
  } catch (cause) {
    const words = printable((cause as Error).message);
    const isStranger = /key values mismatch/i.test(words);
    const said = isStranger ? "the key does not belong to the certificate" : words;
    return fail("TLS", `cannot use the certificates given: ${said}`, { cause });
  }
}

/**
 * As Node does it, but that some versions do not know `::1` in `0:0:0:0:0:0:0:1`, which is how they
 * write it.
 */
function checkIdentity(host: string, cert: tls.PeerCertificate): Error | undefined {
  const error = load("node:tls").checkServerIdentity(host, cert);
  const { subjectaltname: names = "" } = cert;
  // quotes hide what a name is not
  if (!error || !net.isIPv6(host) || names.includes('"')) return error;

  const isSame = (address: string) =>
    net.isIPv6(address) && new URL(`http://[${address}]`).hostname === `[${host}]`;
  const addresses = names.split(", ").map((name) => name.replace(/^IP Address:/, ""));
  return addresses.some(isSame) ? undefined : error;
}

// ------ Proxies ------

const LOOPBACK = "localhost,127.0.0.0/8,::1/128";
const familyOf = (address: string) => (net.isIPv6(address) ? "ipv6" : "ipv4");
const withoutBrackets = (host: string): string => host.replace(/^\[|\]$/g, "");

/**
 * NO_PROXY as Go and curl take it: `*`, names with subdomains, ports, addresses, CIDR blocks;
 * loopback always.
 */
function isExemptFromProxy(url: URL, noProxy: string): boolean {
  const entries = `${LOOPBACK},${noProxy}`
    .toLowerCase()
    .split(/[\s,]+/)
    .filter(Boolean);
  return entries.some((entry) => isInBlock(url, entry) || isNamedBy(url, entry));
}

/** Whether the host is an address in the block `10.0.0.0/8`. */
function isInBlock(url: URL, block: string): boolean {
  const host = withoutBrackets(url.hostname);
  const [address = "", bits = ""] = block.split("/");
  if (net.isIP(host) === 0 || net.isIP(address) === 0 || !/^\d+$/.test(bits)) return false;
  if (Number(bits) > (net.isIPv6(address) ? 128 : 32)) return false;

  const list = new net.BlockList();
  list.addSubnet(address, Number(bits), familyOf(address));
  return list.check(host, familyOf(host));
}

/**
 * Whether `*`, `example.com`, `.example.com`, `*.example.com`, `10.0.0.1` or `[::1]`, each perhaps
 * with `:PORT`, names the URL's host. A name names its subdomains too.
 */
function isNamedBy(url: URL, entry: string): boolean {
  // A bare IPv6 address has colons of its own, and so no port.
  const withPort = /^(?:\[(?<bracketed>[^\]]*)\]|(?<bare>[^:]*))(?::(?<port>\d+))?$/.exec(entry);
  const { bracketed, bare = entry, port } = withPort?.groups ?? {};
  const urlPort = url.port || (url.protocol === "https:" ? "443" : "80");
  if (port !== undefined && port !== urlPort) return false;

  const host = withoutBrackets(url.hostname);
  const name = (bracketed ?? bare).replace(/^\*?\./, "");
  if (name === "") return false;
  if (name === "*" || name === host) return true;
  return net.isIP(host) === 0 && host.endsWith(`.${name}`);
}

/** The proxy that the environment names for a URL, unless NO_PROXY exempts it. */
function proxyFor(url: URL, environment: Environment): URL | undefined {
  const variable = (name: string) => environment[name] || environment[name.toLowerCase()] || "";
  const forScheme = url.protocol === "https:" ? "HTTPS_PROXY" : "HTTP_PROXY";
  const name = [forScheme, "ALL_PROXY"].find(variable);
  if (name === undefined || isExemptFromProxy(url, variable("NO_PROXY"))) return undefined;

  const value = variable(name);
  const text = /^[a-z][a-z0-9+.-]*:\/\//i.test(value) ? value : `http://${value}`;
  if (!URL.canParse(text)) fail("PROXY", `${name} is not a URL: write http://HOST:PORT`);

  const proxy = new URL(text);
  if (proxy.protocol === "http:" || proxy.protocol === "https:") return proxy;
  return fail(
    "PROXY",
    `${name}: a ${proxy.protocol}// proxy is not supported, only http:// and https:// ones are`,
  );
}

const PROXY_REMEDY = "\n  the proxy wants credentials: http://USER:PASSWORD@HOST:PORT";

const proxyName = ({ protocol, host }: URL): string => `the proxy ${protocol}//${host}`;

function proxyHeaders({ username, password }: URL): Record<string, string> {
  if (username === "") return {};
  const authorization = basicAuthorization(percentDecode(username), percentDecode(password));
  return { "Proxy-Authorization": authorization };
}

/**
 * Whether an answer to a forwarded request is the proxy's own: it could not reach the registry, or
 * would not.
 */
function isFromProxy({ statusCode: status = 0, headers }: http.IncomingMessage): boolean {
  if (status === 407) return true;
  if (status < 400 || headers["docker-distribution-api-version"] !== undefined) return false;

  // What only gateways say; and squid, tinyproxy and the like by the headers of their own answers.
  if (status === 502 || status === 504) return true;
  if (headers["x-squid-error"] !== undefined || headers["proxy-status"] !== undefined) return true;
  return /^(squid|tinyproxy|privoxy|polipo|mitmproxy)\b/i.test(String(headers.server));
}

const speaks = (language: string, scheme: string, { host }: URL): string =>
  `it speaks ${language} on this port\n  write it as ${scheme}://${host}`;
const SOCKS_WORDS =
  "it speaks SOCKS on this port, which is not supported: an http:// or https:// proxy is needed";

/**
 * What a proxy speaks if it is not what its URL says, by the first bytes that came or OpenSSL's
 * words.
 */
function mistakenProxy(error: unknown, proxy: URL): string | undefined {
  const { rawPacket, message = "" } = error as { rawPacket?: Buffer; message?: string };
  if (proxy.protocol === "https:")
    return PLAIN_HTTP.test(message) ? speaks("plain HTTP", "http", proxy) : undefined;

  const [firstByte, secondByte = 0] = rawPacket ?? [];
  const isTlsRecord = (firstByte === 0x15 || firstByte === 0x16) && secondByte === 3;
  if (isTlsRecord) return speaks("TLS", "https", proxy);

  const isSocks = firstByte === 5 || (firstByte === 0 && secondByte >= 0x5a);
  return isSocks ? SOCKS_WORDS : undefined;
}

/**
 * Whether a server answers a SOCKS greeting (RFC 1928 §3). Most close what is no SOCKS without a
 * word.
 */
function answersSocks(address: net.TcpNetConnectOpts): Promise<boolean> {
  const socket = net.connect(address);
  socket.setTimeout(LIMITS.diagnosisMs, () => socket.destroy());
  socket.write(Buffer.from([5, 1, 0]));
  return new Promise((resolve) => {
    socket.on("error", ignore);
    socket.once("close", () => resolve(false));
    socket.once("data", (chunk) => {
      resolve(chunk[0] === 5);
      socket.destroy();
    });
  });
}

/** Whether a server takes part in a TLS handshake, whoever it is. */
function answersTls(address: net.TcpNetConnectOpts): Promise<boolean> {
  const socket = load("node:tls").connect({ ...address, rejectUnauthorized: false });
  socket.setTimeout(LIMITS.diagnosisMs, () => socket.destroy());
  return new Promise((resolve) => {
    socket.on("error", ignore);
    socket.once("close", () => resolve(false));
    socket.once("secureConnect", () => {
      resolve(true);
      socket.destroy();
    });
  });
}

/**
 * A proxy, and whether it has ever answered us: until then it may be something else than its URL
 * says.
 */
class ProxyServer {
  readonly url: URL;
  #hasAnswered = false;
  readonly #secrets: Secrets;
  #diagnosis: Promise<string | undefined> | undefined;

  constructor(url: URL, secrets: Secrets) {
    this.url = url;
    this.#secrets = secrets;
    secrets.add(percentDecode(url.password), proxyHeaders(url)["Proxy-Authorization"]?.slice(6));
  }

  markAnswered(): void {
    this.#hasAnswered = true;
  }

  /** What a proxy refuses is told in its name: the registry never saw it. */
  refusal(what: string, response: http.IncomingMessage): ImgpullError {
    const { statusCode: status = 0, statusMessage = "", headers } = response;
    const retryAfterMs = parseRetryAfter(headers["retry-after"], Date.now());
    const isPassing = status === 429 || status >= 500;
    const reason = printable(this.#secrets.strikeWords(statusMessage));
    const isLogin = status === 401 || status === 407; // 401 is tinyproxy's for a wrong password
    const waitMs = isPassing ? retryAfterMs : undefined;
    const remedy = isLogin ? PROXY_REMEDY : remedyForWait(waitMs, Date.now());
    const said = `${proxyName(this.url)} refused ${what}: ${status} ${reason}`;
    return new ImgpullError("PROXY", `${said}${remedy}`, {
      status,
      retryAfterMs: waitMs,
    } as ErrorDetails);
  }

  /**
   * A web server's TLS port answers what is plain with 400, with words about it (Go, nginx) or
   * without.
   */
  async tlsPortError(
    { statusCode }: http.IncomingMessage,
    body = "",
  ): Promise<ImgpullError | undefined> {
    const isInDoubt = statusCode === 400 && this.url.protocol === "http:" && !this.#hasAnswered;
    if (!isInDoubt) return undefined;

    const isTold = /HTTP request.* (to|on) (an? )?HTTPS/i.test(body);
    const mistake = isTold ? speaks("TLS", "https", this.url) : await this.#diagnose();
    if (mistake === undefined) return undefined;
    return new ImgpullError("PROXY", `${proxyName(this.url)}: ${mistake}`);
  }

  /**
   * A failure between us and the proxy, told in its name; one that cannot pass is a PROXY error.
   */
  async explain(error: unknown, doing?: string): Promise<ImgpullError> {
    const where = doing === undefined ? proxyName(this.url) : `${proxyName(this.url)}, ${doing}`;
    const isClosed = errorCodeOf(error) === "ECONNRESET" && !this.#hasAnswered;
    const isInDoubt = isClosed && this.url.protocol === "http:";
    const mistake =
      mistakenProxy(error, this.url) ?? (isInDoubt ? await this.#diagnose() : undefined);
    if (mistake === undefined) return connectionError(error, where);
    return new ImgpullError("PROXY", `${where}: ${mistake}`, { cause: error });
  }

  /**
   * Nothing came in time. A plain proxy waits for a whole line where it is sent the beginning of
   * TLS.
   */
  silence(isHandshake: boolean, limitMs: number): ImgpullError {
    const seconds = limitMs / 1000;
    const isDoubtful = isHandshake && this.url.protocol === "https:" && !this.#hasAnswered;
    if (!isDoubtful) return timeoutError(proxyName(this.url), `it is silent for ${seconds} s`);
    return new ImgpullError(
      "PROXY",
      `${proxyName(this.url)}: no TLS in ${seconds} s\n  if it speaks plain HTTP, write it as http://${this.url.host}`,
    );
  }

  /** Asked once, where a server closed without an answer: what it speaks. */
  #diagnose(): Promise<string | undefined> {
    const { hostname, port } = this.url;
    const address = { host: withoutBrackets(hostname), port: Number(port || 80) };
    this.#diagnosis ??= Promise.all([answersSocks(address), answersTls(address)]).then(
      ([isSocks, isTls]) => {
        if (isSocks) return SOCKS_WORDS;
        return isTls ? speaks("TLS", "https", this.url) : undefined;
      },
    );
    return this.#diagnosis;
  }
}

type OnConnection = (error: Error | null, socket?: net.Socket) => void;

interface Tunnel {
  readonly proxy: ProxyServer;
  readonly options: http.RequestOptions;
  readonly timeoutMs: number;
}

/** An agent's new connection: TLS inside a CONNECT tunnel (RFC 9110 §9.3.6). */
function connectThrough(
  { proxy, options, timeoutMs }: Tunnel,
  target: tls.ConnectionOptions,
  done: OnConnection,
): void {
  const host = net.isIPv6(String(target.host)) ? `[${target.host}]` : target.host;
  const authority = `${host}:${target.port}`;
  const connect = clientFor(proxy.url).request(proxy.url.origin, {
    ...options,
    ...SOCKET_OPTIONS,
    method: "CONNECT",
    path: authority,
    headers: { Host: authority, ...proxyHeaders(proxy.url) },
  });

  limitConnecting(connect, timeoutMs, (isHandshake) => proxy.silence(isHandshake, timeoutMs));
  limitAnswer(connect, timeoutMs, () => proxy.silence(false, timeoutMs));
  connect.once("error", async (error) => done(await proxy.explain(error)));
  connect.once("connect", async (response, socket, head) => {
    const { statusCode: status = 0 } = response;
    if (status >= 200 && status < 300) {
      proxy.markAnswered();
      done(null, load("node:tls").connect({ ...target, socket }));
      return;
    }

    socket.destroy();
    const tlsPortError = await proxy.tlsPortError(response, String(head));
    done(tlsPortError ?? proxy.refusal(`CONNECT ${outside(authority)}`, response));
  });
  connect.end();
}

// ------ Agents ------

/**
 * Owns the connections, which are kept alive: one agent for each origin, way there, and certificate
 * shown.
 */
class AgentPool {
  readonly #settings: Settings;
  readonly #agents = new Map<string, Promise<http.Agent>>();
  // for tunnels that are being asked for: no agent knows them yet
  readonly #closing = new AbortController();
  // to parse the system's certificates takes long
  #commonContext: Promise<tls.SecureContext> | undefined;

  constructor(settings: Settings) {
    this.#settings = settings;
    setMaxListeners(0, this.#closing.signal); // one for each tunnel that is being asked for
  }

  agentFor(url: URL, role: Role, proxy?: ProxyServer): Promise<http.Agent> {
    const key = `${url.origin} ${role} ${proxy?.url.href}`;
    const agent = this.#agents.get(key) ?? this.#makeAgent(url, role, proxy);
    this.#agents.set(key, agent);
    return agent;
  }

  close(): void {
    this.#closing.abort();
    for (const agent of this.#agents.values()) agent.then((ready) => ready.destroy(), ignore);
  }

  async #makeAgent(url: URL, role: Role, proxy?: ProxyServer): Promise<http.Agent> {
    const { timeoutMs, insecure } = this.#settings;
    const keepAlive = { keepAlive: true, scheduling: "lifo" as const };
    const proxyTls = proxy?.url.protocol === "https:" ? await this.#tlsToProxy(proxy.url) : {};
    if (url.protocol === "http:")
      return new (clientFor(proxy?.url ?? url).Agent)({ ...keepAlive, ...proxyTls });

    const agent = new (load("node:https").Agent)({
      ...keepAlive,
      secureContext: await this.#contextFor(url, role),
      rejectUnauthorized: insecure !== true,
      checkServerIdentity: checkIdentity,
    });
    if (!proxy) return agent;

    const options = { ...proxyTls, agent: false as const, signal: this.#closing.signal };
    const createConnection = (target: tls.ConnectionOptions, done: OnConnection) =>
      connectThrough({ proxy, options, timeoutMs }, target, done);
    return Object.assign(agent, { createConnection });
  }

  /**
   * Node takes the name to verify from the Host header, which is the target's, unless it is told.
   * For an address it needs the address itself, since it would look for `[::1]` in the certificate.
   */
  async #tlsToProxy(proxy: URL) {
    const host = withoutBrackets(proxy.hostname);
    return {
      secureContext: await this.#contextFor(proxy, "other"),
      servername: net.isIP(host) === 0 ? host : "",
      checkServerIdentity: (_host: string, cert: tls.PeerCertificate) => checkIdentity(host, cert),
    };
  }

  async #contextFor(url: URL, role: Role): Promise<tls.SecureContext> {
    const { tlsCert, tlsKey, ...common } = this.#settings;
    const folders = role === "other" ? [] : await this.#certsFoldersOf(url);
    if (role === "registry" && tlsCert !== undefined)
      return makeSecureContext(this.#settings, folders);
    if (folders.length > 0) return makeSecureContext(common, folders);

    this.#commonContext ??= makeSecureContext(common);
    return this.#commonContext;
  }

  /** `HOST:443` and `HOST` are one registry, however its folder is named. */
  async #certsFoldersOf({ host, port }: URL): Promise<string[]> {
    const names = port === "" ? [host, `${host}:443`] : [host];
    const folders = names.map((name) => path.join(this.#settings.certsDirectory, name));
    const lists = await Promise.all(folders.map(listOptional));
    return folders.filter((_folder, index) => lists[index]?.length);
  }
}

// ------ One request ------

/** A request on its way to one place. */
interface Exchange {
  readonly request: HttpRequest;
  readonly url: URL;
  readonly outgoing: http.ClientRequest;
  /** The proxy that plain HTTP is handed to; a tunnel is the agent's affair. */
  readonly forwarder: ProxyServer | undefined;
  readonly doing: string;
}

/** Sends requests and follows their redirects. */
class Transport {
  readonly #settings: Settings;
  readonly #secrets: Secrets;
  readonly #agents: AgentPool;
  readonly #patience: Patience;
  readonly #proxies = new Map<string, ProxyServer>();

  constructor(settings: Settings, secrets: Secrets) {
    this.#settings = settings;
    this.#secrets = secrets;
    this.#agents = new AgentPool(settings);
    this.#patience = new Patience(settings.timeoutMs);
  }

  send(request: HttpRequest): Promise<Answer> {
    const sendOnce: SendOnce = (url, headers) => this.#sendOnce(request, url, headers);
    return followRedirects(request, sendOnce, this.#secrets);
  }

  close(): void {
    this.#agents.close();
  }

  async #sendOnce(request: HttpRequest, url: URL, headers: Record<string, string>): Promise<Sent> {
    const exchange = await this.#open(request, url, headers);
    const { outgoing } = exchange;
    outgoing.end(request.body);

    let sentAtMs = performance.now();
    whenConnected(outgoing, () => {
      sentAtMs = performance.now();
    });
    let response: http.IncomingMessage;
    try {
      // With the signal: while a proxy says nothing, there is no socket yet whose end could tell.
      [response] = (await once(outgoing, "response", { signal: request.signal })) as [
        http.IncomingMessage,
      ];
    } catch (error) {
      if (isStaleConnection(outgoing, error)) return this.#sendOnce(request, url, headers);
      throw await this.#failure(exchange, error);
    }
    const waitedMs = performance.now() - sentAtMs;

    const refusal = await proxyRefusal(exchange, response);
    if (refusal) {
      outgoing.destroy();
      throw refusal;
    }
    tidyHeaders(response.headers);
    return { response, waitedMs };
  }

  /** A request with all its guards, of which nothing is sent yet. */
  async #open(request: HttpRequest, url: URL, headers: Record<string, string>): Promise<Exchange> {
    const { timeoutMs } = this.#settings;
    const { method, signal, isBlob = false } = request;
    const doing = `${method} ${redactUrl(url)}`;
    const proxy = this.#proxyFor(url);
    const forwarder = url.protocol === "http:" ? proxy : undefined;
    const agent = await this.#agents.agentFor(url, request.roleOf(url.origin), proxy);

    const options = { ...SOCKET_OPTIONS, method, headers, signal, agent, timeout: timeoutMs };
    const outgoing = forwarder
      ? forwardRequest(forwarder.url, url, options)
      : clientFor(url).request(url, options);
    outgoing.maxHeadersCount = 0; // no bound but the bytes'
    surviveLateErrors(outgoing);

    const isTunnel = proxy !== undefined && forwarder === undefined;
    const connectMs = isTunnel ? 3 * timeoutMs : timeoutMs; // its two steps, and TLS in it
    limitConnecting(
      outgoing,
      connectMs,
      (isHandshake) =>
        forwarder?.silence(isHandshake, connectMs) ??
        timeoutError(doing, `nothing came for ${connectMs / 1000} s`),
    );
    const where = forwarder ? `${proxyName(forwarder.url)}, ${doing}` : doing;
    this.#patience.limitHeaders(outgoing, request.url, where);
    limitBody(outgoing, { timeoutMs, isBlob, doing });
    return { request, url, outgoing, forwarder, doing };
  }

  /** Why there was no answer. */
  async #failure(exchange: Exchange, error: unknown): Promise<ImgpullError> {
    const { request, url, outgoing, forwarder, doing } = exchange;
    if (error instanceof ImgpullError) return error;
    if (forwarder) return forwarder.explain(error, doing);

    // In TLS 1.3 a server refuses our certificate after the handshake, and many only close.
    const { tlsCert } = this.#settings;
    const isShown = tlsCert !== undefined && request.roleOf(url.origin) === "registry";
    const isInDoubt = isShown && !outgoing.reusedSocket && errorCodeOf(error) === "ECONNRESET";
    if (!isInDoubt) return connectionError(error, doing);
    const words = `${doing}: connection lost\n  ${CLIENT_CERTIFICATE_REMEDY}`;
    return new ImgpullError("NETWORK", words, { cause: error });
  }

  /** The proxy that the environment names for a URL, the same one each time. */
  #proxyFor(url: URL): ProxyServer | undefined {
    const proxyUrl = proxyFor(url, this.#settings.environment);
    if (!proxyUrl) return undefined;

    const proxy = this.#proxies.get(proxyUrl.href) ?? new ProxyServer(proxyUrl, this.#secrets);
    this.#proxies.set(proxyUrl.href, proxy);
    return proxy;
  }
}

/** What a proxy answers to a forwarded request in its own name. */
async function proxyRefusal(
  { forwarder, doing }: Exchange,
  response: http.IncomingMessage,
): Promise<ImgpullError | undefined> {
  const tlsPortError = await forwarder?.tlsPortError(response);
  if (tlsPortError) return tlsPortError;

  forwarder?.markAnswered();
  return forwarder && isFromProxy(response) ? forwarder.refusal(doing, response) : undefined;
}

/**
 * A kept-alive connection that the server closed, or left bytes of the last answer on: nothing was
 * answered, so the same request may be sent again at once.
 */
function isStaleConnection(outgoing: http.ClientRequest, error: unknown): boolean {
  return outgoing.reusedSocket && /^(ECONNRESET$|HPE_)/.test(errorCodeOf(error));
}

/**
 * With a blank before the colon, `Content-Length : 2`, Node's lenient parser takes the blank for a
 * part of the name.
 */
function tidyHeaders(headers: http.IncomingHttpHeaders): void {
  for (const [name, value] of Object.entries(headers)) {
    const trimmed = name.trimEnd();
    if (trimmed === name) continue;
    headers[trimmed] ??= value;
    delete headers[name];
  }
}

/** Plain HTTP goes to the proxy in absolute form (RFC 9112 §3.2.2). */
function forwardRequest(proxy: URL, url: URL, options: http.RequestOptions): http.ClientRequest {
  const headers = { ...options.headers, Host: url.host, ...proxyHeaders(proxy) };
  // The proxy's origin, not its URL: Node would make an Authorization header, for the registry, of
  // its password.
  return clientFor(proxy).request(proxy.origin, { ...options, path: url.href, headers });
}

// ------ Socket guards ------

/**
 * Errors are met where the request is awaited, or by the one who reads the body; none may end the
 * process.
 */
function surviveLateErrors(outgoing: http.ClientRequest): void {
  outgoing.on("error", ignore);
  // Between two requests a connection has no listener: until Node 26 an abort at that moment would
  // end the process.
  outgoing.once("socket", (socket) => socket.off("error", ignore).on("error", ignore));
  // After a 101 that nobody asked for, Node closes without a response or an error.
  outgoing.once("close", () => outgoing.emit("error", new Error("closed without an answer")));
  outgoing.once("response", (incoming) => incoming.on("error", ignore));
}

// ------ Deadlines ------
// Node's own time-out starts anew with each byte, so a server that sends one now and then would
// hold us for ever. Here connecting, headers, and all bodies but a blob's have to be whole in time;
// a blob has to go on moving.

function timeoutError(doing: string, words: string): ImgpullError {
  return new ImgpullError("TIMEOUT", `${doing}: ${words}\n  \`timeoutMs\` waits longer`);
}

/**
 * Calls `late` when a time is over; what it gives back calls that off. What has come by then is
 * read first: a process that was stopped, or got no processor, has it in its buffers, and that is
 * no silence of the server's.
 */
function startDeadline(limitMs: number, late: () => void): () => void {
  let judging: NodeJS.Immediate | undefined;
  const timer = setTimeout(() => {
    judging = setImmediate(late);
  }, limitMs);
  return () => {
    clearTimeout(timer);
    clearImmediate(judging);
  };
}

/** Calls `proceed` once the request has a connection, TLS included. */
function whenConnected(outgoing: http.ClientRequest, proceed: () => void): void {
  outgoing.once("socket", (socket) => {
    if (outgoing.reusedSocket) proceed();
    else socket.once("encrypted" in socket ? "secureConnect" : "connect", proceed);
  });
}

/** `lateError` is told whether the other side has taken the connection, and only TLS is missing. */
function limitConnecting(
  outgoing: http.ClientRequest,
  limitMs: number,
  lateError: (isHandshake: boolean) => ImgpullError,
): void {
  const isHandshake = () => outgoing.socket?.connecting === false;
  const callOff = startDeadline(limitMs, () => outgoing.destroy(lateError(isHandshake())));
  whenConnected(outgoing, callOff);
  outgoing.once("close", callOff);
}

/** From when the connection is there until the answer's headers are. */
function limitAnswer(
  outgoing: http.ClientRequest,
  limitMs: number,
  lateError: () => ImgpullError,
): void {
  whenConnected(outgoing, () => {
    const callOff = startDeadline(limitMs, () => outgoing.destroy(lateError()));
    for (const end of ["response", "connect", "close"]) outgoing.once(end, callOff);
  });
}

/**
 * How long headers are waited for. A cache may fetch a whole layer before it answers: whoever was
 * silent too long is given twice as long at the next attempt, up to a bound.
 */
class Patience {
  readonly #timeoutMs: number;
  readonly #factors = new Map<string, number>();

  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs;
  }

  limitHeaders(outgoing: http.ClientRequest, asked: URL, doing: string): void {
    const key = `${asked.origin}${asked.pathname}`;
    const factor = this.#factors.get(key) ?? 1;
    const limitMs = factor * this.#timeoutMs;

    limitAnswer(outgoing, limitMs, () => {
      // Set, not doubled: many requests for the same blob may have begun to wait together.
      this.#factors.set(key, Math.min(2 * factor, LIMITS.headersWaitFactor));
      return timeoutError(doing, `nothing came for ${limitMs / 1000} s`);
    });
  }
}

interface BodyLimits {
  readonly timeoutMs: number;
  readonly isBlob: boolean;
  readonly doing: string;
}

/** A blob has to move; words of a refusal have to be there at once, and a document soon. */
function limitBody(outgoing: http.ClientRequest, limits: BodyLimits): void {
  const { timeoutMs, isBlob, doing } = limits;

  outgoing.once("response", (incoming: http.IncomingMessage) => {
    const { socket } = incoming;
    const judge = (readBefore: number) => {
      const hasCome = socket.bytesRead > readBefore; // by now, see startDeadline
      if (hasCome || isReaderSlow(incoming)) outgoing.setTimeout(timeoutMs);
      else incoming.destroy(timeoutError(doing, `nothing came for ${timeoutMs / 1000} s`));
    };
    outgoing.on("timeout", () => setImmediate(judge, socket.bytesRead));

    const isRefusal = (incoming.statusCode ?? 0) >= 300;
    if (isBlob && !isRefusal) return limitSlowness(incoming, 2 * timeoutMs, doing);

    const limitMs = isRefusal ? timeoutMs : LIMITS.documentWaitFactor * timeoutMs;
    const callOff = startDeadline(limitMs, () => {
      incoming.destroy(timeoutError(doing, `the answer was not whole after ${limitMs / 1000} s`));
    });
    incoming.once("close", callOff);
  });
}

/**
 * Silence that we asked for (the disk or the reader is slower than the line) is not the server's.
 */
const isReaderSlow = (incoming: http.IncomingMessage): boolean => incoming.readableLength > 0;

/** Ends a body that hardly moves: over each period it has to bring some KiB. */
function limitSlowness(incoming: http.IncomingMessage, periodMs: number, doing: string): void {
  const leastBytes = (LIMITS.slowBytesPerSecond * periodMs) / 1000;
  const { socket } = incoming;
  let readBefore = socket.bytesRead;

  const judge = () => {
    const { bytesRead } = socket;
    const cameBytes = bytesRead - readBefore;
    readBefore = bytesRead;
    if (cameBytes >= leastBytes || isReaderSlow(incoming)) return;
    const words = `only ${cameBytes} bytes came in ${periodMs / 1000} s`;
    incoming.destroy(timeoutError(doing, words));
  };
  const timer = setInterval(() => setImmediate(judge), periodMs);
  incoming.once("close", () => clearInterval(timer));
}

// ------ Redirects ------

/** A response's headers are there, `waitedMs` after its request had a connection. */
type Sent = Readonly<{ response: http.IncomingMessage; waitedMs: number }>;
type SendOnce = (url: URL, headers: Record<string, string>) => Promise<Sent>;

/**
 * Follows redirects by hand: relative ones too, at most ten, never from https to http, never with a
 * secret body.
 */
async function followRedirects(
  request: HttpRequest,
  sendOnce: SendOnce,
  secrets: Secrets,
): Promise<Answer> {
  let { url } = request;

  for (let hops = 0; ; hops += 1) {
    const authorization = await request.authorizationFor(url.origin);
    secrets.add(authorization?.replace(/^\S+ /, ""));
    const { response, waitedMs } = await sendOnce(url, {
      "User-Agent": `imgpull/${IMGPULL_VERSION}`,
      "Accept-Encoding": "identity",
      ...request.headers,
      ...dropEmpty({ Authorization: authorization }),
    });

    const { statusCode: status = 0, headers } = response;
    const isElsewhere = url.origin !== request.url.origin && url.search !== "";
    const answer = { status, headers, url, isElsewhere, authorization, words: "", waitedMs };
    if (status >= 200 && status < 300) return { ...answer, body: response };

    const isRedirect = [301, 302, 303, 307, 308].includes(status) && request.body === undefined;
    if (!isRedirect || headers.location === undefined)
      return { ...answer, words: printable(secrets.strikeWords(await readWords(response))) };

    dropBody(response);
    if (hops >= LIMITS.redirects)
      fail("PROTOCOL", `${redactUrl(url)}: more than ${LIMITS.redirects} redirects`);
    url = redirectTarget(url, headers.location);
    secrets.addSigned(url);
    if (request.mayAsk?.(url) === false)
      fail(
        "PROTOCOL",
        `${redactUrl(request.url)} redirects to ${redactUrl(url)}: not followed there`,
      );
  }
}

/** Where a redirect leads, unless that is a way which credentials or bytes must not go. */
function redirectTarget(from: URL, location: string): URL {
  if (!URL.canParse(location, from)) fail("PROTOCOL", `${redactUrl(from)} redirects to no URL`);

  const target = new ForeignUrl(decodeLatin1(location), from);
  const isFollowed =
    target.protocol === "https:" || (target.protocol === "http:" && from.protocol === "http:");
  if (isFollowed) return target;

  const way = `from ${from.protocol} to ${outside(target.protocol)}`;
  return fail(
    "PROTOCOL",
    `${redactUrl(from)} redirects to ${redactUrl(target)}: not followed ${way}`,
  );
}

/** Node reads header bytes as Latin-1; in a Location there may be bytes of UTF-8, as they are. */
function decodeLatin1(text: string): string {
  const bytes = Buffer.from(text, "latin1");
  const decoded = bytes.toString("utf8");
  return decoded.includes("\ufffd") ? text : decoded;
}

// ------ Bodies ------

/**
 * A short body is read, so that the connection can be kept; of a longer one nothing more is taken.
 */
function dropBody(response: http.IncomingMessage): void {
  let length = 0;
  response.on("error", ignore).on("data", (chunk: Buffer) => {
    length += chunk.length;
    if (length > LIMITS.redirectBodyBytes) response.destroy();
  });
}

const isGzip = (bytes: Buffer | null): boolean => bytes?.[0] === 0x1f && bytes[1] === 0x8b;

/**
 * Some front ends compress although `identity` was asked for, and some only say that they do.
 * Others store a gzip layer with a Content-Encoding that describes the layer itself: there the
 * length gives it away, and the bytes are what was asked for.
 */
async function decodeBody(
  response: http.IncomingMessage,
  expectedBytes: number,
): Promise<Readable> {
  const { "content-encoding": encoding = "", "content-length": length } = response.headers;
  const isRaw = Number(length) === expectedBytes;
  if (!/^(x-)?gzip$/i.test(encoding) || isRaw) return response;

  await Promise.race([once(response, "readable"), once(response, "close")]).catch(ignore);
  const head = response.read() as Buffer | null;
  if (head) response.unshift(head);
  if (!isGzip(head)) return response;

  const decoded = load("node:zlib").createGunzip();
  response.once("error", (error) => decoded.destroy(error));
  return response.pipe(decoded.once("close", () => response.destroy()));
}

/**
 * A whole body of at most `maximumBytes`; more is refused by name before it is held. Whether it is
 * packed in gzip is seen by its first bytes, whatever its label, unless it has the digest as it is.
 */
async function readBody(
  response: http.IncomingMessage,
  maximumBytes: number,
  what: string,
  digest?: string,
): Promise<Buffer> {
  const checkSize = (bytes: number) => {
    if (bytes > maximumBytes) fail("TOO_LARGE", `${what} is larger than ${maximumBytes} bytes`);
  };

  const chunks: Buffer[] = [];
  let length = 0;
  try {
    checkSize(Number(response.headers["content-length"] ?? 0));
    for await (const chunk of response as AsyncIterable<Buffer>) {
      length += chunk.length;
      checkSize(length);
      chunks.push(chunk);
    }

    const bytes = Buffer.concat(chunks);
    if (!isGzip(bytes) || (digest && digestOf(bytes, digest) === digest)) return bytes;
    return load("node:zlib").gunzipSync(bytes, { maxOutputLength: maximumBytes });
  } catch (error) {
    response.destroy();
    if (errorCodeOf(error) === "ERR_BUFFER_TOO_LARGE") checkSize(NEVER);
    throw connectionError(error, what);
  }
}

/** The words of a refusal, as they are; none where they cannot be read. */
async function readWords(response: http.IncomingMessage): Promise<string> {
  try {
    return wordsOfError(await readBody(response, LIMITS.errorBodyBytes, "the error's body"));
  } catch (error) {
    if ((error as ImgpullError).code === "ABORTED") throw error;
    return "";
  }
}

/**
 * `errors[]` of the distribution specification, a token service's fields, or plain text; nothing of
 * a web page.
 */
function wordsOfError(body: Buffer): string {
  const json = parseJson(body);
  if (!isRecord(json)) {
    const text = String(body);
    return /^[\s\ufeff]*</.test(text) ? wordsOfXml(text) : text;
  }

  const first: unknown = Array.isArray(json.errors) ? json.errors[0] : undefined;
  const { code, message } = isRecord(first) ? first : {};
  const candidates = [
    code,
    message,
    json.details,
    json.message,
    json.error_description,
    json.error,
  ];
  const words = candidates.filter((word) => typeof word === "string" && word !== "");
  return words.slice(0, 2).join(": ");
}

/**
 * What S3 and Azure say where they refuse: `<Error><Code>…</Code><Message>…</Message>`. Other
 * markup is a web page.
 */
function wordsOfXml(text: string): string {
  if (!/<Error[\s>]/.test(text)) return "";
  const words = ["Code", "Message"].map((name) => {
    const [, content = ""] = new RegExp(`<${name}>([^<]*)</${name}>`).exec(text) ?? [];
    return content.replace(
      /&(lt|gt|quot|apos|amp);/g,
      (_all, entity) => XML_ENTITIES[entity] ?? "",
    );
  });
  return words.filter(Boolean).join(": ");
}

const XML_ENTITIES: Record<string, string> = { lt: "<", gt: ">", quot: '"', apos: "'", amp: "&" };

// ====== 7. Retry ======
// Pure but for the clock, which tests replace. Only known passing faults are retried; a bug never
// is.

const sleep = (waitMs: number, signal: AbortSignal): Promise<unknown> =>
  delay(waitMs, undefined, { signal });
const systemClock = { now: Date.now, random: Math.random, sleep };

/** Whether the same request may go better soon. The one place that decides it. */
function isRetriable(error: unknown): error is ImgpullError {
  if (!(error instanceof ImgpullError)) return false;
  const { code, status = 0, retryAfterMs } = error;

  // A name that does not exist is a typo, and what Node's permission model refuses stays refused.
  if (code === "NETWORK")
    return !["ENOTFOUND", "ERR_ACCESS_DENIED"].includes(errorCodeOf(error.cause));

  // Silence passes, and so do limits.
  if (code === "TIMEOUT" || code === "RATE_LIMITED") return true;

  // Wrong bytes may be one broken cache of several.
  if (code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH") return true;

  // The server says when to come back.
  if (retryAfterMs !== undefined) return true;

  // Too slow, too early, or the server's own trouble, but for what it will never do.
  if (status === 408 || status === 425 || status === 429) return true;
  return status >= 500 && status !== 501 && status !== 505;
}

/**
 * How long to wait before the next attempt; undefined where there is none. `failures` counts those
 * so far.
 */
function retryDelayMs(
  error: unknown,
  failures: number,
  retries: number,
  random: number,
): number | undefined {
  if (!isRetriable(error)) return undefined;
  const { code, retryAfterMs = 0 } = error;

  // Wrong bytes twice are what the server has.
  const isMismatch = code === "DIGEST_MISMATCH" || code === "SIZE_MISMATCH";
  const most = isMismatch ? Math.min(1, retries) : retries;
  if (failures > most) return undefined;

  // Whether to wait that long is the user's to decide.
  if (retryAfterMs > LIMITS.retryAfterMs) return undefined;

  // Twice as long each time, and by chance, so that many clients do not come back at once.
  const ceilingMs = Math.min(LIMITS.backoffMs, LIMITS.firstBackoffMs * 2 ** (failures - 1));
  const backoffMs = Math.round(ceilingMs * (0.5 + random / 2));
  return Math.max(retryAfterMs, backoffMs);
}

/** What all requests of one pull have in common. */
interface RequestContext {
  readonly settings: Settings;
  readonly transport: Transport;
  readonly clock: typeof systemClock;
  readonly signal: AbortSignal;
  readonly warn: (message: string) => void;
  readonly secrets: Secrets;
}

/**
 * Runs `attempt` until it succeeds. `gotOn` says whether the failed one brought us forward: the
 * count starts anew.
 */
async function withRetries<T>(
  { clock, settings, signal, warn }: RequestContext,
  attempt: () => Promise<T>,
  gotOn = () => false,
): Promise<T> {
  const { retries } = settings;

  for (let failures = 1; ; failures += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (signal.aborted) stopped(error);

      if (gotOn()) failures = 1;
      const waitMs = retryDelayMs(error, failures, retries, clock.random());
      if (waitMs === undefined) throw error;

      const reason = firstLineOf((error as Error).message);
      const seconds = (waitMs / 1000).toFixed(1);
      warn(`${reason}; trying again in ${seconds} s (${failures} of ${retries})`);
      await clock.sleep(waitMs, signal).catch(stopped);
    }
  }
}

// ====== 8. Credentials and tokens ======
// Challenges (RFC 9110 §11.6.1), docker's and podman's files, helpers, the distribution token
// protocol. Invariant: a credential is for one registry; it goes there and to the token endpoint
// which that registry names.

// ------ Challenges ------

interface Challenge {
  readonly scheme: string;
  readonly parameters: Record<string, string>;
}

/**
 * Every challenge of every header line: commas separate both parameters and challenges, and may be
 * inside quotes. Semicolons, colons and single quotes are nobody's grammar, and are met all the
 * same.
 */
function parseChallenges(lines: readonly string[]): Challenge[] {
  const challenges: Challenge[] = [];
  const word =
    /([\s,;:]*)([!#$%&'*+.^_`|~0-9A-Za-z/-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"?|[^\s,;"]*))?/gy;

  for (const match of lines.flatMap((line) => [...line.matchAll(word)])) {
    const [, separator = "", name = "", value] = match;
    const current = challenges.at(-1)?.parameters;
    const isToken68 = value !== undefined && /^=*$/.test(value); // as Negotiate sends

    const isFirst = match.index === 0 || /[,;]/.test(separator) || isUsable(name.toLowerCase());
    if (value === undefined && isFirst) {
      challenges.push({ scheme: name.toLowerCase(), parameters: {} });
    } else if (current && value !== undefined && !isToken68) {
      current[name.toLowerCase()] ??= value.replace(/^["']|["']$/g, "").replace(/\\(.)/g, "$1");
    }
  }

  return challenges;
}

const challengesOf = ({ headers }: Answer): Challenge[] =>
  parseChallenges([headers["www-authenticate"] ?? ""]);

const isUsable = (scheme: string): boolean => scheme === "bearer" || scheme === "basic";

/** Whether there is anything that we know to answer to. */
const hasUsable = (challenges: readonly Challenge[]): boolean =>
  challenges.some(({ scheme }) => isUsable(scheme));

// ------ Credential files and helpers ------

/**
 * `stored` ones come from a file or a helper: where they are refused, a public image can still be
 * pulled.
 */
type Credential = Readonly<{
  kind: "basic" | "identity" | "bearer";
  username: string;
  secret: string;
  source: string;
  stored: boolean;
}>;

/** A place that may hold credentials: JSON as docker writes it, in the environment or in a file. */
type CredentialPlace = Readonly<{
  variable?: string;
  text?: (environment: Environment) => string | undefined;
  file?: (environment: Environment) => string | undefined;
  isAuthsOnly?: boolean; // the file is what `auths` is elsewhere
}>;

const homeOf = ({ HOME }: Environment): string => HOME ?? os.homedir();

/** A path below a directory that the environment names; undefined where it names none. */
const below = (directory: string | undefined, ...names: string[]): string | undefined =>
  directory ? path.join(directory, ...names) : undefined;

/** podman's file, below XDG's directories. */
const AUTH_JSON = "containers/auth.json";

/**
 * `podman login` without a session of its own (sudo, cron, containers) writes below /run
 * (podman#3752).
 */
function runtimeDirectory({ XDG_RUNTIME_DIR }: Environment): string | undefined {
  if (XDG_RUNTIME_DIR !== undefined) return below(XDG_RUNTIME_DIR, "containers");
  const userId = process.getuid?.();
  return userId === undefined ? undefined : `/run/containers/${userId}`;
}

/**
 * The places in the order of precedence; the first that knows the registry is taken. A new
 * credential file is one line here. A file that a `variable` names has to be there; the others may
 * be missing.
 */
const CREDENTIAL_PLACES: readonly CredentialPlace[] = [
  { variable: "REGISTRY_AUTH_FILE", file: (environment) => environment.REGISTRY_AUTH_FILE },
  { variable: "DOCKER_AUTH_CONFIG", text: (environment) => environment.DOCKER_AUTH_CONFIG },
  {
    file: (environment) =>
      below(environment.DOCKER_CONFIG || below(homeOf(environment), ".docker"), "config.json"),
  },
  { file: (environment) => below(runtimeDirectory(environment), "auth.json") },
  {
    file: (environment) =>
      below(environment.XDG_CONFIG_HOME || below(homeOf(environment), ".config"), AUTH_JSON),
  },
  { file: (environment) => below(homeOf(environment), ".dockercfg"), isAuthsOnly: true },
];

/**
 * Whose credential is looked for. A mirror's is not among the options, which are for the registry
 * alone.
 */
type CredentialOwner = Readonly<{ reference: Reference; scheme: string; role: Role }>;

/**
 * The credential for a repository: the options' own, or that of the first place which knows its
 * registry.
 */
async function findCredential(
  session: Session,
  owner: CredentialOwner,
): Promise<Credential | undefined> {
  const { settings } = session;
  const fromOptions = owner.role === "registry" ? credentialOfOptions(settings) : undefined;
  if (fromOptions) return fromOptions;

  const { environment } = settings;
  for (const place of CREDENTIAL_PLACES) {
    const file = place.file?.(environment);
    const text = file ? await readCredentialFile(file, place.variable) : place.text?.(environment);
    if (!text) continue;

    const source = file ?? place.variable ?? "";
    const json = parseJson(text);
    if (!isRecord(json)) return fail("CREDENTIALS", `${source} is not a JSON object`);
    const content = place.isAuthsOnly ? { auths: json } : json;
    const credential = await credentialIn({ ...content, source }, owner, session);
    if (credential) return credential;
  }

  return undefined;
}

function credentialOfOptions({ token, username, password }: Settings): Credential | undefined {
  const common = { kind: "basic", username: username ?? "", stored: false } as const;
  if (token !== undefined) return { ...common, secret: token, source: "`token`" };
  if (username === undefined) return undefined;
  return { ...common, secret: password ?? "", source: "`username` and `password`" };
}

/** Undefined where there is none; one that a variable names has to be there. */
async function readCredentialFile(
  file: string,
  variable: string | undefined,
): Promise<string | undefined> {
  const what = variable === undefined ? `the credential file ${file}` : `${variable} names ${file}`;
  const isMissing = (cause: unknown): boolean =>
    ["ENOENT", "ENOTDIR", "ERR_ACCESS_DENIED"].includes(errorCodeOf(cause));

  try {
    if ((await fs.stat(file)).size <= LIMITS.credentialFileBytes)
      return await fs.readFile(file, "utf8");
  } catch (cause) {
    if (variable === undefined && isMissing(cause)) return undefined;
    fail("CREDENTIALS", `${what}: ${diskWords(cause)}`, { cause });
  }

  return fail("CREDENTIALS", `${what}: too large for a credential file`);
}

/** What docker and podman write. `source` is ours: where it was found. */
interface CredentialFile {
  readonly source: string;
  readonly auths?: unknown;
  readonly credHelpers?: unknown;
  readonly credsStore?: unknown;
}

/**
 * The credential that one file has for a repository: its helper, its store, or an entry of `auths`.
 */
async function credentialIn(
  { source, auths, credHelpers, credsStore }: CredentialFile,
  { reference, scheme }: CredentialOwner,
  session: Session,
): Promise<Credential | undefined> {
  const { host } = reference;
  const wanted = normalizeAuthKey(placeOf(reference), scheme);
  const isName = (value: unknown): value is string => typeof value === "string" && value !== "";
  const isFilled = (value: unknown): value is Record<string, unknown> =>
    isRecord(value) && Object.keys(value).length > 0;

  const helper = longestPath(entriesOfHost(credHelpers, wanted, scheme, isName), wanted)?.value;
  const program = helper ?? credsStore;
  const server = host === "docker.io" ? "https://index.docker.io/v1/" : host;
  const fromHelper = isName(program) && (await askHelperOnce(program, server, session));
  if (fromHelper) return fromHelper;

  const entries = entriesOfHost(auths, wanted, scheme, isFilled);
  const entry = longestPath(entries, wanted) ?? entries[0];
  return entry && decodeAuthEntry(entry.value, source);
}

/** A place of a registry: the host as one writes it, and the parts of the path. */
interface AuthKey {
  readonly host: string;
  readonly path: readonly string[];
}

/** docker writes URLs with /v1/, podman host and path, people what they see in a browser. */
function normalizeAuthKey(written: string, scheme: string): AuthKey {
  const [authority = "", ...path] = written
    .replace(/^https?:\/\//i, "")
    .replace(/\/(v1|v2)?\/?$/, "")
    .split("/");
  const defaultPort = scheme === "http" ? /:80$/ : /:443$/;
  const host = authority.toLowerCase().replace(defaultPort, "");
  return { host: canonicalHost(host), path };
}

type AuthEntry<T> = AuthKey & { readonly value: T };

/** The usable entries for the host, those with the shortest paths first. */
function entriesOfHost<T>(
  entries: unknown,
  { host }: AuthKey,
  scheme: string,
  isUsable: (value: unknown) => value is T,
): AuthEntry<T>[] {
  const ofHost: AuthEntry<T>[] = [];
  for (const [written, value] of Object.entries(entries ?? {})) {
    const key = normalizeAuthKey(written, scheme);
    if (key.host === host && isUsable(value)) ofHost.push({ ...key, value });
  }
  return ofHost.sort((left, right) => left.path.length - right.path.length);
}

/** The entry whose path is the longest that leads to a repository. */
function longestPath<T>(
  entries: readonly AuthEntry<T>[],
  { path }: AuthKey,
): AuthEntry<T> | undefined {
  return entries.findLast((entry) => entry.path.every((part, at) => part === path[at]));
}

/** An entry of `auths`; undefined where it is empty. */
function decodeAuthEntry(entry: Record<string, unknown>, source: string): Credential | undefined {
  const text = (name: string): string => (typeof entry[name] === "string" ? entry[name] : "");
  const decoded = Buffer.from(text("auth"), "base64").toString("utf8").replace(/\0+$/, "");
  if (text("auth") && !decoded.includes(":"))
    fail("CREDENTIALS", `${source}: "auth" is not USER:PASSWORD in base64`);

  const [, username = text("username"), password = text("password")] =
    /^([^:]*):(.*)$/s.exec(decoded) ?? [];
  const common = { username, source, stored: true };
  const identity = text("identitytoken");
  if (identity) return { ...common, kind: "identity", secret: identity };

  const bearer = text("registrytoken");
  if (!isHeaderWord(bearer || "-"))
    fail("CREDENTIALS", `${source}: its "registrytoken" fits no header`);
  if (bearer) return { ...common, kind: "bearer", secret: bearer };

  if (username === "" && password === "") return undefined;
  return { ...common, kind: "basic", secret: password };
}

/**
 * Whether a header can carry it as one word; anything else could end the header and begin another.
 */
const isHeaderWord = (text: string): boolean => /^[\x21-\x7e]+$/.test(text);

/** What a helper said, and why it did not end well. */
type HelperEnd = Readonly<{
  stdout: string;
  stderr: string;
  failure: ExecFileException | null;
}>;

/**
 * Runs beside us, since it may ask a person: meanwhile Ctrl-C is heard, and the library's caller
 * gets on.
 */
function runHelper(
  program: string,
  input: string,
  { environment }: Settings,
  signal: AbortSignal,
): Promise<HelperEnd> {
  const options = {
    env: { ...environment },
    timeout: LIMITS.helperMs,
    killSignal: "SIGKILL", // what it may trap or ignore does not end it
    maxBuffer: LIMITS.tokenBytes,
    encoding: "utf8",
  } as const;
  return new Promise((resolve) => {
    const { execFile } = load("node:child_process");
    const child = execFile(program, ["get"], options, (failure, stdout, stderr) => {
      signal.removeEventListener("abort", stop);
      resolve({ failure, stdout, stderr });
    });
    const stop = () => {
      child.kill("SIGKILL"); // execFile's own signal would send what can be trapped,
      child.stdout?.destroy(); // and what the helper has started may hold its output open
      child.stderr?.destroy();
    };
    signal.addEventListener("abort", stop);
    child.stdin?.on("error", ignore).end(input); // it may end without reading it
  });
}

/**
 * Repositories of one host that are resolved side by side ask once: a person may have to answer.
 */
function askHelperOnce(
  name: string,
  server: string,
  session: Session,
): Promise<Credential | undefined> {
  const key = `${name} ${server}`;
  const asking = session.helpers.get(key) ?? askHelper(name, server, session);
  session.helpers.set(key, asking);
  return asking;
}

/**
 * docker-credential-NAME: the server on stdin, JSON on stdout (docker/docker-credential-helpers).
 */
async function askHelper(
  name: string,
  server: string,
  { settings, signal }: Session,
): Promise<Credential | undefined> {
  const source = `docker-credential-${name}`;
  const refuse = (reason: string): never =>
    fail("CREDENTIALS", `the credential helper ${printable(source)} ${reason}`);
  if (!/^[\w.+-]+$/.test(name)) refuse("has a name that is not one");

  const { stdout, stderr, failure } = await runHelper(source, server, settings, signal);
  if (signal.aborted) fail("ABORTED", "stopped");
  const code = failure?.code; // the exit code, or a word of Node's
  if (typeof code === "string") {
    if (code === "ENOENT") refuse("cannot be run: it is not on the PATH");
    refuse(`cannot be run: ${code}`);
  }
  if (failure?.killed) refuse(`has not answered in ${LIMITS.helperMs / 1000} s`);

  if (failure && /credentials not found/i.test(`${stdout}${stderr}`)) return undefined;
  // Of its stdout nothing is shown: a Secret may be in it.
  if (failure) refuse(`failed: ${printable(stderr) || `exit code ${code ?? failure.signal}`}`);

  if (stdout.trim() === "") return undefined; // as `{}`: it has none
  const answer = parseJson(stdout);
  if (!isRecord(answer)) return refuse("answered what is not a JSON object");
  if (Object.keys(answer).length === 0) return undefined;

  const { Username: username = "", Secret: secret } = answer;
  if (typeof username !== "string" || typeof secret !== "string")
    return refuse("answered without a Secret");
  const entry = username === "<token>" ? { identitytoken: secret } : { username, password: secret };
  return decodeAuthEntry(entry, source);
}

// ------ What a status means ------

const STORAGE_HOST = "the storage host";

const STATUS_CODES: Readonly<Record<number, ErrorCode>> = {
  401: "UNAUTHORIZED",
  403: "FORBIDDEN",
  404: "NOT_FOUND",
  407: "PROXY",
  429: "RATE_LIMITED",
};

/** What a status means, with the words of the one who said it. */
function statusError(answer: Answer, now: number, who: string): ImgpullError {
  const { status, words, headers, url } = answer;
  const mayWait = status === 429 || status >= 500;
  const waitMs = mayWait ? parseRetryAfter(headers["retry-after"], now) : undefined;
  const remedy = remedyFor(answer, waitMs, now);
  const said = `${redactUrl(url)}: ${who} answered ${status}${words ? ` (${words})` : ""}${remedy}`;

  // A storage host's refusal is a signed URL that has expired: asking the registry again gives a
  // new one.
  const isExpired = who === STORAGE_HOST && [400, 401, 403].includes(status);
  return new ImgpullError(STATUS_CODES[status] ?? "PROTOCOL", said, {
    status,
    retryAfterMs: isExpired ? 0 : waitMs,
  } as ErrorDetails);
}

/** A second line for the statuses about which something can be done. */
function remedyFor({ status, words }: Answer, waitMs: number | undefined, now: number): string {
  if (status === 407) return PROXY_REMEDY;
  if (status === 429) return `\n  too many requests: ${whenToComeBack(waitMs, now)}`;
  const isHttpsPort = /HTTP request (was sent )?to (an )?HTTPS/i.test(words);
  return isHttpsPort
    ? "\n  this port is https: try without `scheme` http"
    : remedyForWait(waitMs, now);
}

/** When to come back, where that is later than we wait. */
const remedyForWait = (waitMs = 0, now: number): string =>
  waitMs > LIMITS.retryAfterMs ? `\n  ${whenToComeBack(waitMs, now)}` : "";

function whenToComeBack(waitMs: number | undefined, now: number): string {
  if (!waitMs) return "try again later";
  if (waitMs > LIMITS.absurdWaitMs)
    return "it says not to come back for more than a year: ask who runs it, or try again later";
  const date = new Date(now + waitMs);
  return `come back in ${Math.ceil(waitMs / 1000)} s, at ${date.toISOString()}`;
}

// ------ Tokens ------

/** What an Authorization header carries, and until when it is good. */
interface Authorization {
  readonly header: string;
  readonly expiresAt: number;
}

/**
 * Whose token is asked for: `origin` has named the realm, and `role` says which certificates it may
 * see.
 */
type TokenRequest = Readonly<{
  origin: string;
  role: Role;
  parameters: Readonly<Record<string, string>>; // of the challenge, with the scope that is wanted
  credential: Credential | undefined;
}>;

/** Azure's registry wants this name with the tokens that it has issued itself. */
const NOBODY = "00000000-0000-0000-0000-000000000000";

/**
 * A token for one repository (distribution specification, "Token Authentication"; OAuth2 for
 * identity tokens).
 */
async function fetchToken(context: RequestContext, request: TokenRequest): Promise<Authorization> {
  const url = parseRealm(request);
  return (
    (await exchangeIdentityToken(context, url, request)) ?? (await getToken(context, url, request))
  );
}

/**
 * The token endpoint: relative to the registry, and never less private than the registry itself.
 */
function parseRealm({ parameters: { realm }, origin, role }: TokenRequest): URL {
  const registry = role === "other" ? outside(origin) : origin;
  if (!realm || !URL.canParse(realm, origin))
    return fail("PROTOCOL", `${registry} names no usable realm for its tokens`);

  const url = new ForeignUrl(realm, origin);
  const named = `${registry} names the token endpoint ${redactUrl(url)}`;
  const isPrivateEnough = ["https:", new URL(origin).protocol].includes(url.protocol);
  if (!isPrivateEnough) fail("PROTOCOL", `${named}: not over ${url.protocol}`);

  // A registry could have us ask, with a password, what only we can reach
  // (google/go-containerregistry#2258).
  if (leadsInside(url, origin))
    fail("PROTOCOL", `${named}: an address inside a network, where the registry is not`);
  return url;
}

/**
 * Addresses that are not of the internet: loopback, link-local (where clouds keep metadata),
 * private, unspecified.
 */
const INSIDE_BLOCKS = [
  "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16",
  "::/127 fc00::/7 fe80::/10 ff02::/16",
]
  .join(" ")
  .split(" ");

/** Whether a URL's host is such an address, and not the registry's own. Names are not looked up. */
function leadsInside({ hostname }: URL, registryOrigin: string): boolean {
  const address = withoutBrackets(hostname);
  const isOwn = hostname === new URL(registryOrigin).hostname;
  if (isOwn || net.isIP(address) === 0) return false;

  const blocks = new net.BlockList();
  for (const block of INSIDE_BLOCKS) {
    const [network = "", bits] = block.split("/");
    blocks.addSubnet(network, Number(bits), familyOf(network));
  }
  return blocks.check(address, familyOf(address));
}

/**
 * By OAuth2's POST. Undefined where there is no identity token, or where the service does not know
 * how.
 */
async function exchangeIdentityToken(
  context: RequestContext,
  url: URL,
  request: TokenRequest,
): Promise<Authorization | undefined> {
  const { credential, parameters } = request;
  if (credential?.kind !== "identity") return undefined;

  const { service, scope } = parameters;
  const grant = {
    ...dropEmpty({ service, scope }),
    grant_type: "refresh_token",
    client_id: "imgpull",
    refresh_token: credential.secret,
  };
  const answer = await context.transport.send({
    ...tokenHttpRequest(context, url, request),
    method: "POST",
    headers: { "Content-Type": "application/x-www-form-urlencoded" },
    body: String(new URLSearchParams(grant)),
  });

  if (isNoOAuth2(answer.status)) return undefined;
  return readToken(context, url, answer);
}

/**
 * Services without OAuth2 say so in many ways (containerd#3913); a redirect would want the secret
 * sent elsewhere.
 */
function isNoOAuth2(status: number): boolean {
  const isForLater = [408, 425, 429].includes(status);
  return status === 501 || (status >= 300 && status < 500 && !isForLater);
}

/** By GET, with the credential as user and password. */
async function getToken(
  context: RequestContext,
  url: URL,
  request: TokenRequest,
): Promise<Authorization> {
  const { credential, parameters } = request;
  const { service, scope } = parameters;
  const asked = new ForeignUrl(url);
  for (const [name, value] of Object.entries(dropEmpty({ service, scope })))
    asked.searchParams.set(name, value);

  const header = credential && basicAuthorization(credential.username || NOBODY, credential.secret);
  const answer = await context.transport.send(tokenHttpRequest(context, asked, request, header));
  const token = await readToken(context, url, answer);
  return token ?? fail("PROTOCOL", `${redactUrl(url)} answered without a token`);
}

/** A request to the token service. The header goes to its own origin only. */
const tokenHttpRequest = (
  { signal }: RequestContext,
  url: URL,
  { origin, role }: TokenRequest,
  header?: string,
): HttpRequest => ({
  method: "GET",
  url,
  headers: {},
  signal,
  authorizationFor: async (each) => (each === url.origin ? header : undefined),
  roleOf: (each) => (each === origin ? role : "other"),
});

/** Undefined where a body came that holds no token. */
async function readToken(
  { clock }: RequestContext,
  url: URL,
  answer: Answer,
): Promise<Authorization | undefined> {
  const now = clock.now();
  if (!answer.body) throw statusError(answer, now, "the token service");

  const what = `the token of ${redactUrl(url)}`;
  return parseToken(await readBody(answer.body, LIMITS.tokenBytes, what), now);
}

/** `token` or `access_token`, and how long it lives. */
function parseToken(body: Buffer, now: number): Authorization | undefined {
  const json = parseJson(body);
  const answer = isRecord(json) ? json : {};
  const token = answer.token || answer.access_token;
  if (typeof token !== "string" || !isHeaderWord(token)) return undefined;

  const seconds = typeof answer.expires_in === "number" ? answer.expires_in : 0;
  return {
    header: `Bearer ${token}`,
    expiresAt: now + Math.max(LIMITS.tokenFloorMs, seconds * 1000),
  };
}

// ====== 9. Registry ======
// One repository of one registry: manifests and blobs from an offset, with whatever handshake it
// wants. Invariant: what is asked for by digest has that digest before anyone sees it; a blob's
// bytes its reader checks.

/**
 * What one pull knows of all its registries: the challenge of each origin, a Registry (and so a
 * token) for each repository, what is in memory, and which mirrors fail.
 */
interface Session extends RequestContext {
  readonly challenges: Map<string, readonly Challenge[]>;
  readonly helpers: Map<string, Promise<Credential | undefined>>; // what credential helpers answer
  readonly registries: Map<string, Registry>;
  readonly budget: Budget;
  readonly mirrorFaults: MirrorFaults;
}

// ------ Handshake ------

/**
 * What has become of a credential: the token service takes it, and the registry may refuse that
 * token all the same.
 */
type CredentialFate = "unsent" | "sent" | "accepted";

/**
 * What is shown to whom, for one repository: it alone looks up a credential, and holds the tokens.
 */
class Authorizer {
  readonly #session: Session;
  readonly #owner: CredentialOwner;
  readonly #registryOrigin: string;
  readonly #authorizations = new Map<string, Authorization>(); // by origin
  readonly #renewals = new Map<string, Promise<boolean>>(); // by origin, while they are under way
  readonly #taken = new WeakSet<Authorization>(); // those that have opened something
  #lookup: Promise<Credential | undefined> | undefined;
  #fate: CredentialFate = "unsent";
  #refusedCredential: Credential | undefined; // once there is one, later requests are anonymous
  #otherScope: string | undefined; // the challenge's, once ours was refused
  // of the credential to a registry that had not asked for one
  #offer: Promise<boolean> | undefined;

  constructor(session: Session, owner: CredentialOwner, registryOrigin: string) {
    const { token } = session.settings;
    this.#session = session;
    this.#owner = owner;
    this.#registryOrigin = registryOrigin;
    if (token !== undefined && owner.role === "registry") {
      this.#authorizations.set(registryOrigin, { header: `Basic ${token}`, expiresAt: NEVER });
      this.#fate = "sent";
    }
  }

  /** The header for an origin that is known to want one, anew where the last has expired. */
  async headerFor(origin: string): Promise<string | undefined> {
    const expiresAt = this.#authorizations.get(origin)?.expiresAt ?? 0;
    const isExpired = expiresAt <= this.#session.clock.now();
    const isWanted = hasUsable(this.#session.challenges.get(origin) ?? []);

    if (isWanted && isExpired) await this.#renew(origin);
    return this.#authorizations.get(origin)?.header;
  }

  /**
   * Learns from every answer: that a token was taken, and from a registry's first refusal how to
   * get one.
   */
  hear(answer: Answer): void {
    const { origin } = answer.url;
    const isRedirected = origin !== this.#registryOrigin;
    const ours = this.#authorizations.get(this.#registryOrigin);
    const theirs = this.#authorizations.get(origin);
    if (isRedirected && ours) this.#taken.add(ours);
    if (answer.body && theirs && theirs.header === answer.authorization) this.#taken.add(theirs);

    const challenges = challengesOf(answer);
    const isNews = answer.status === 401 && !this.#session.challenges.has(origin);
    if (isNews && hasUsable(challenges)) this.#session.challenges.set(origin, challenges);
  }

  /** Whether `answer` was a refusal after which another attempt may go better. */
  async canGoOnAfter(answer: Answer, kind: ContentKind): Promise<boolean> {
    const { origin } = answer.url;
    if (origin === this.#registryOrigin && isSilentRefusal(answer)) {
      this.#offer ??= this.#offerCredential(origin);
      return this.#offer;
    }
    if (!isAboutAuthorization(answer)) return false;

    // Requests are refused side by side: what one of them has begun, the others wait for.
    const underWay = this.#renewals.get(origin);
    if (underWay) return underWay;
    if (this.#isReplaced(answer)) return true;

    const isStale = this.#isStale(answer);
    // That proof is denied says nothing of the credentials, which have just given a manifest.
    if (isProof(kind) && answer.authorization !== undefined && !isStale) return false;
    this.#learnChallenge(answer, isStale);
    if (!isStale && answer.authorization !== undefined) return this.#replaceRefused(answer);
    return this.#renew(origin).catch((error) => {
      // What only proof wants, and nobody gets, is not asked for on behalf of other requests.
      if (isProof(kind)) this.#session.challenges.delete(origin);
      throw error;
    });
  }

  #isReplaced({ url, authorization: sent }: Answer): boolean {
    return this.#authorizations.get(url.origin)?.header !== sent;
  }

  /** Whether a token that was taken before is refused now: its time is over. */
  #isStale({ url, status }: Answer): boolean {
    const current = this.#authorizations.get(url.origin);
    if (!current || status === 403 || current.header.startsWith("Basic ")) return false;
    return this.#taken.has(current);
  }

  /**
   * nvcr.io names another realm, of no use to us, once a token has expired: the one that served
   * goes first.
   */
  #learnChallenge(answer: Answer, isStale: boolean): void {
    const { origin } = answer.url;
    const challenges = challengesOf(answer);
    const isKnown = isStale && this.#session.challenges.has(origin);
    if (challenges.length > 0 && !isKnown) this.#session.challenges.set(origin, challenges);
  }

  /** What was sent opens nothing: the other scope, or no credential at all, may. */
  async #replaceRefused(answer: Answer): Promise<boolean> {
    const { url, status } = answer;
    if (this.#takeOtherScope(url.origin, challengesOf(answer))) return this.#renew(url.origin);

    const credential = await this.#credentialFor(url.origin);
    if (this.#isReplaced(answer)) return true;
    if (!credential?.stored) return false;
    this.#goAnonymous(credential, `${redactUrl(url)}: ${status}`);
    await this.#renew(url.origin);
    // without a token too: a challenge met at another repository need not be this one's
    return true;
  }

  /**
   * Some registries tell nobody that there is more to see (keppel#522), or forget the challenge
   * (harbor#15252): where a credential is at hand, /v2/ is asked how to show it. False: nothing has
   * changed.
   */
  async #offerCredential(origin: string): Promise<boolean> {
    if (!(await this.#credentialFor(origin))) return false;

    const { signal, transport, challenges } = this.#session;
    const answer = await transport.send({
      method: "GET",
      url: new URL("/v2/", origin),
      headers: {},
      signal,
      authorizationFor: async () => undefined,
      roleOf: (each) => this.#roleOf(each),
    });
    answer.body?.destroy();

    const offered = challengesOf(answer);
    if (answer.url.origin !== origin || !hasUsable(offered)) return false;
    challenges.set(origin, offered);
    return this.#renew(origin);
  }

  /** A refusal with the word of which credentials were tried, and from where. */
  async explain({ code, message, status }: ImgpullError): Promise<ImgpullError> {
    const explained = code === "FORBIDDEN" ? code : "UNAUTHORIZED";
    return new ImgpullError(explained, `${message}\n  ${await this.#triedWords()}`, { status });
  }

  async #triedWords(): Promise<string> {
    const place = placeOf(this.#owner.reference);
    const isAccepted = this.#fate === "accepted";
    if (this.#refusedCredential) {
      const stored = `the stored credentials (${this.#refusedCredential.source})`;
      return isAccepted
        ? `${stored} are right, but may not pull ${place}, nor may a request without`
        : `${stored} were refused, and so was a request without`;
    }

    const credential = await this.#credentialFor(this.#registryOrigin);
    if (!credential)
      return "no credentials were found (`username`, `token`, docker login); a repository that does not exist looks the same";
    if (this.#fate === "unsent")
      return `the credentials of ${credential.source} were not sent: the registry asks for none of their kind`;
    return isAccepted
      ? `the credentials of ${credential.source} are right, but may not pull ${place}`
      : `refused: the credentials of ${credential.source}`;
  }

  /** Looked up when a registry asks for it first; storage hosts and other origins never get it. */
  async #credentialFor(origin: string): Promise<Credential | undefined> {
    if (this.#refusedCredential || origin !== this.#registryOrigin) return undefined;
    this.#lookup ??= findCredential(this.#session, this.#owner);
    const credential = await this.#lookup;
    this.#session.secrets.add(credential?.secret);
    return credential;
  }

  #goAnonymous(refused: Credential, reason: string): void {
    this.#refusedCredential = refused;
    this.#otherScope = undefined;
    this.#authorizations.delete(this.#registryOrigin);
    const outcome = this.#fate === "accepted" ? "do not open it" : "were refused";
    this.#session.warn(
      `the credentials of ${refused.source} ${outcome} (${reason}); trying without any`,
    );
  }

  /**
   * Connections that are refused at the same time get one new token between them. False: we have
   * nothing to show.
   */
  #renew(origin: string): Promise<boolean> {
    const underWay = this.#renewals.get(origin);
    if (underWay) return underWay;

    const renewal = this.#renewOnce(origin).finally(() => this.#renewals.delete(origin));
    this.#renewals.set(origin, renewal);
    return renewal;
  }

  async #renewOnce(origin: string): Promise<boolean> {
    const authorization = await this.#answerChallenge(origin);
    if (authorization) this.#authorizations.set(origin, authorization);
    return authorization !== undefined;
  }

  /**
   * A token, or the credential itself, as the origin wants it; undefined where we have nothing of
   * the kind.
   */
  async #answerChallenge(origin: string): Promise<Authorization | undefined> {
    const challenges = this.#session.challenges.get(origin) ?? [];
    const credential = await this.#credentialFor(origin);
    const bearers = challenges.filter(({ scheme }) => scheme === "bearer");
    const takesBasic = bearers.length < challenges.filter(({ scheme }) => isUsable(scheme)).length;
    if (bearers.length > 0 && credential?.kind === "bearer") {
      this.#fate = "sent";
      return { header: `Bearer ${credential.secret}`, expiresAt: NEVER };
    }

    // One without a realm gives no token: it only counts where there is no other way.
    const bearer =
      bearers.find(({ parameters }) => parameters.realm) ?? (takesBasic ? undefined : bearers[0]);
    if (bearer) return this.#tokenFor(origin, bearer, credential);

    if (!takesBasic || credential?.kind !== "basic") return undefined;
    const { username, secret } = credential;
    this.#fate = "sent";
    return { header: basicAuthorization(username, secret), expiresAt: NEVER };
  }

  async #tokenFor(
    origin: string,
    { parameters }: Challenge,
    credential: Credential | undefined,
  ): Promise<Authorization | undefined> {
    const role = this.#roleOf(origin);
    const scope = this.#scopeFor(role, parameters.scope);
    if (credential) this.#fate = "sent";

    try {
      const request = { origin, role, parameters: { ...parameters, scope }, credential };
      const token = await fetchToken(this.#session, request);
      if (credential) this.#fate = "accepted";
      return token;
    } catch (error) {
      const { status = 0, message } = error as ImgpullError;
      if (![400, 401, 403, 404].includes(status)) throw error;

      if (this.#takeOtherScope(origin, [{ scheme: "bearer", parameters }]))
        return this.#answerChallenge(origin);
      if (credential?.stored) {
        this.#goAnonymous(credential, message);
        return this.#answerChallenge(origin);
      }
      const isAboutCredentials = status === 401 || credential !== undefined;
      throw isAboutCredentials ? await this.explain(error as ImgpullError) : error;
    }
  }

  /**
   * Exactly one scope. The target of a redirect has repositories of its own, and says which one it
   * wants.
   */
  #scopeFor(role: Role, theirs: string | undefined): string {
    const ours = `repository:${this.#owner.reference.repository}:pull`;
    if (role !== "other") return this.#otherScope ?? ours;
    return theirs || ours;
  }

  #roleOf(origin: string): Role {
    return origin === this.#registryOrigin ? this.#owner.role : "other";
  }

  /**
   * Where ours was refused: once the scope that the registry's challenge names. False: it names no
   * other.
   */
  #takeOtherScope(origin: string, challenges: readonly Challenge[]): boolean {
    if (origin !== this.#registryOrigin || this.#otherScope !== undefined) return false;

    const bearer = challenges.find(({ scheme }) => scheme === "bearer");
    this.#otherScope = otherScope(bearer?.parameters.scope, this.#owner.reference.repository);
    return this.#otherScope !== undefined;
  }
}

/**
 * The scope of a challenge that is not for our repository: a proxy that rewrites paths knows it by
 * another name (oras-go#650), and ECR Public has scopes of its own kind (oras-dotnet#395). Of
 * actions, we want `pull` only.
 */
function otherScope(scopes = "", repository: string): string | undefined {
  for (const scope of scopes.split(" ").filter(Boolean)) {
    const [, name] = /^repository(?:\([^)]*\))?:(.+):[^:]*$/.exec(scope) ?? [];
    if (name === undefined) return scope;
    if (name !== repository) return `repository:${name}:pull`;
  }
  return undefined;
}

/** A refusal of a request without credentials that does not say how to show any. */
function isSilentRefusal(answer: Answer): boolean {
  const { status, authorization: sent } = answer;
  if (sent !== undefined) return false;
  return status === 403 || status === 404 || (status === 401 && !hasUsable(challengesOf(answer)));
}

/**
 * ECR Public answers a stale token with 400, GHCR a stale credential for a public image with 403.
 */
function isAboutAuthorization({ status, authorization: sent }: Answer): boolean {
  if (status === 401) return true;
  if (status === 400) return sent?.startsWith("Bearer ") === true;
  return status === 403 && sent !== undefined;
}

// ------ Requests ------

interface FetchedManifest {
  readonly mediaType: string;
  readonly digest: string;
  readonly bytes: Buffer;
}

type ManifestHead = Pick<Descriptor, "mediaType" | "digest" | "size">;

/** Nobody needs to have proof of an image: a manifest under a tag for it, and the list of it. */
type ContentKind = "manifest" | "blob" | "proof" | "referrer";

const PATHS: Readonly<Record<ContentKind, string>> = {
  manifest: "manifests",
  blob: "blobs",
  proof: "manifests",
  referrer: "referrers",
};

const isProof = (kind: ContentKind): boolean => kind === "proof" || kind === "referrer";

const ANY_TYPE = "*/*";

/**
 * One place that may have a repository: its registry, or a mirror of it. Owns what is known of that
 * place.
 */
class Endpoint {
  readonly name: string; // as people write it
  readonly origin: string;
  readonly role: Role;
  readonly #session: Session;
  readonly #reference: Reference; // as this place knows it
  readonly #namespace: string | undefined;
  readonly #authorizer: Authorizer;
  #manifestTypes = MANIFEST_TYPES.join(", "); // what it takes as Accept
  #firstContact: Promise<unknown> | undefined;
  #hasServed = false;
  #acceptsRanges = true; // false once it has refused a range, or answered one with the whole

  constructor(session: Session, reference: Reference, mirror?: Mirror) {
    const { scheme, namespace } = session.settings;
    const place = mirror ?? { scheme, host: reference.host, prefix: "" };
    const repository = `${place.prefix}/${reference.repository}`.replace(/^\//, "");
    this.name = `${place.host}/${place.prefix}`.replace(/\/$/, "");
    this.origin = new URL(`${place.scheme}://${apiHost(place.host)}`).origin;
    this.role = mirror ? "mirror" : "registry";
    this.#session = session;
    this.#reference = { ...reference, host: place.host, repository };
    this.#namespace = mirror ? reference.host : namespace;
    const owner = { reference: this.#reference, scheme: place.scheme, role: this.role };
    this.#authorizer = new Authorizer(session, owner, this.origin);
  }

  get hasServed(): boolean {
    return this.#hasServed;
  }

  get acceptsRanges(): boolean {
    return this.#acceptsRanges;
  }

  /** It is asked for whole blobs only from now on. */
  giveUpRanges(): void {
    this.#acceptsRanges = false;
  }

  #urlOf(kind: ContentKind, name: string): URL {
    const url = new URL(`${this.origin}/v2/${this.#reference.repository}/${PATHS[kind]}/${name}`);
    if (this.#namespace !== undefined) url.searchParams.set("ns", this.#namespace);
    return url;
  }

  async manifest(tagOrDigest: string, kind: ContentKind = "manifest"): Promise<FetchedManifest> {
    const document = await this.document(kind, tagOrDigest, LIMITS.manifestBytes);
    const { bytes, digest, where, type } = document;
    const mediaType = sniffMediaType(bytes, type);
    if (mediaType !== undefined) return { bytes, digest, mediaType };

    const what = `this is not a manifest but ${outside(type, 80)}`;
    return fail("PROTOCOL", `${where}: ${what}: is ${this.#reference.host} a registry?`);
  }

  /** A manifest or config as a whole, verified against the digest where one was asked for. */
  async document(kind: ContentKind, name: string, maximumBytes: number) {
    const { body, url, headers } = await this.request("GET", kind, name);
    const where = redactUrl(url);
    const what = `the ${kind} ${where}`;
    const sought = isDigest(name) ? name : undefined;
    const bytes = await readBody(body as http.IncomingMessage, maximumBytes, what, sought);

    const digest = isDigest(name)
      ? digestOf(bytes, name)
      : digestByName(bytes, headers["docker-content-digest"]);
    if (isDigest(name) && digest !== name)
      fail("DIGEST_MISMATCH", `${where}: the bytes have the digest ${digest}`);
    return { bytes, digest, where, type: headers["content-type"] ?? "nothing named" };
  }

  /** What HEAD tells of a manifest; undefined where something is left out. */
  async head(tagOrDigest: string): Promise<ManifestHead | undefined> {
    const { headers, body } = await this.request("HEAD", "manifest", tagOrDigest);
    body?.resume();

    const digest = headers["docker-content-digest"];
    const size = Number(headers["content-length"] ?? 0);
    const type = headers["content-type"] ?? "";
    const mediaType = MANIFEST_TYPES.find((each) => type.startsWith(each));
    return mediaType && isDigest(digest) && size > 0 ? { mediaType, digest, size } : undefined;
  }

  /** The pages of the referrers endpoint. */
  async referrers(digest: string): Promise<Buffer[]> {
    const pages: Buffer[] = [];
    let url: URL | undefined = this.#urlOf("referrer", digest);

    while (url) {
      const page: { bytes: Buffer; next?: URL } = await this.#page(digest, url);
      pages.push(page.bytes);
      if (pages.length > LIMITS.referrerPages)
        fail("TOO_LARGE", `${redactUrl(url)}: more than ${LIMITS.referrerPages} pages`);
      url = page.next;
    }
    return pages;
  }

  /** One page, and where the next one is. */
  #page(digest: string, url: URL): Promise<{ bytes: Buffer; next?: URL }> {
    return withRetries(this.#session, async () => {
      const { body, headers } = await this.request("GET", "referrer", digest, { url });
      const what = `the list of referrers ${redactUrl(url)}`;
      const bytes = await readBody(body as http.IncomingMessage, LIMITS.manifestBytes, what);
      const json = parseJson(bytes);
      // GHCR and others answer every path with some page: that is no endpoint, as peers see it.
      const isList = isRecord(json) && Array.isArray(json.manifests);
      if (!isList) fail("NOT_FOUND", `${what} is none`, { status: 404 });
      return { bytes, ...dropEmpty({ next: nextPage(headers.link, url) }) };
    });
  }

  /** One answer with a body, after at most one handshake, one renewal and one fallback. */
  async request(
    method: string,
    kind: ContentKind,
    name: string,
    more: Partial<HttpRequest> = {},
  ): Promise<Answer> {
    const { signal } = this.#session;
    const request: HttpRequest = {
      method,
      url: this.#urlOf(kind, name),
      signal,
      authorizationFor: (origin) => this.#authorizer.headerFor(origin),
      roleOf: (origin) => (origin === this.origin ? this.role : "other"),
      ...more,
      headers: {
        Accept: PATHS[kind] === PATHS.manifest ? this.#manifestTypes : ANY_TYPE,
        ...more.headers,
      },
    };

    for (let round = 0; ; round += 1) {
      const answer = await this.#sendInTurn(request);
      if (answer.body) {
        this.#hasServed = true;
        return answer;
      }

      // It has something of another type (docker_registry2#40), which is looked at when it comes.
      if (answer.status === 406 && request.headers.Accept !== ANY_TYPE) {
        this.#manifestTypes = ANY_TYPE;
        return this.request(method, kind, name, more);
      }

      if (round === 3 || !(await this.#authorizer.canGoOnAfter(answer, kind)))
        throw await this.#refusal(answer, kind, name);
    }
  }

  /**
   * The first request for a repository goes alone: the challenge that it meets serves all the
   * others.
   */
  async #sendInTurn(request: HttpRequest): Promise<Answer> {
    const isFirst = this.#firstContact === undefined;
    if (!isFirst) await this.#firstContact;

    const sending = this.#session.transport.send(request).then((answer) => {
      this.#authorizer.hear(answer);
      return answer;
    });
    if (isFirst) this.#firstContact = sending.catch(ignore);
    return sending;
  }

  /** A refusal in the user's terms. */
  async #refusal(answer: Answer, kind: ContentKind, name: string): Promise<ImgpullError> {
    const who = answer.url.origin === this.origin ? `the ${this.role}` : STORAGE_HOST;
    const error = statusError(answer, this.#session.clock.now(), who);
    const { code, status, message, retryAfterMs } = error;

    if (code === "NOT_FOUND") {
      const missing = missingWords(answer, this.#reference, kind, name);
      const isPage = answer.headers["content-type"]?.includes("html");
      const doubt = isPage ? `: is ${this.#reference.host} a registry?` : "";
      return new ImgpullError(code, `no such ${missing}\n  ${message}${doubt}`, { status });
    }

    const isForGood = retryAfterMs === undefined;
    const isAccess = code === "UNAUTHORIZED" || code === "FORBIDDEN";
    return isAccess && isForGood ? this.#authorizer.explain(error) : error;
  }
}

// ------ A repository, wherever it is had from ------

/**
 * The documents of one pull: they are in memory until DEST is written, whatever registries send.
 */
class Budget {
  #bytes = 0;

  add(document: Buffer, reference: Reference): void {
    this.#bytes += document.length;
    this.check(reference);
  }

  /** Once it is used up nothing more is asked for. */
  check(reference: Reference): void {
    const { documentBytes } = LIMITS;
    if (this.#bytes <= documentBytes) return;
    const most = formatBytes(documentBytes);
    fail(
      "TOO_LARGE",
      `${formatReference(reference)}: manifests and configs are above ${most} in all`,
    );
  }
}

/** What one pull has met at its mirrors, whatever the repository. */
class MirrorFaults {
  readonly #outOfOrder = new Set<Mirror>();
  readonly #lost = new Set<Mirror>(); // of those that have served: for what passes by itself
  readonly #told = new Set<Mirror>();

  isOutOfOrder(mirror: Mirror): boolean {
    return this.#outOfOrder.has(mirror);
  }

  /** Whether it may be back, and can be asked for what nobody else has. */
  isLost(mirror: Mirror): boolean {
    return this.#lost.has(mirror);
  }

  /** A mirror that cannot be reached, or lies, does so for other repositories too. */
  note(mirror: Mirror, error: ImgpullError, hasServed: boolean): void {
    if (MIRROR_WIDE.includes(error.code)) this.#outOfOrder.add(mirror);
    if (hasServed && isPassing(error)) this.#lost.add(mirror);
  }

  /** Each mirror has one warning, whatever more it does. */
  isFirst(mirror: Mirror): boolean {
    const isFirst = !this.#told.has(mirror);
    this.#told.add(mirror);
    return isFirst;
  }
}

const MIRROR_WIDE: readonly ErrorCode[] = [
  "NETWORK",
  "TIMEOUT",
  "TLS",
  "PROXY",
  "RATE_LIMITED",
  "DIGEST_MISMATCH",
];

/**
 * One repository: its mirrors in their order, then its registry. What one place cannot give, the
 * next one is asked.
 */
class Registry {
  readonly reference: Reference;
  readonly #session: Session;
  readonly #mirrors: ReadonlyMap<Endpoint, Mirror>;
  readonly #home: Endpoint;
  readonly #denials = new Map<ContentKind, string>(); // of proof: the first of each kind
  readonly #passedOver = new Set<Endpoint>(); // mirrors that cannot give what they should
  #forgiven = 0; // failures of mirrors
  readonly #manifests = new Map<string, Promise<FetchedManifest>>(); // by digest: each is read once
  // by the blob's digest
  readonly #mirrorAnswers = new Map<string, { mirror: Endpoint; hasFailed: boolean }[]>();

  constructor(session: Session, reference: Reference) {
    const mirrors = session.settings.mirrors.get(canonicalHost(reference.host)) ?? [];
    this.#session = session;
    this.reference = reference;
    this.#mirrors = new Map(
      mirrors.map((mirror) => [new Endpoint(session, reference, mirror), mirror]),
    );
    this.#home = new Endpoint(session, reference);
  }

  get origin(): string {
    return this.#home.origin;
  }

  get acceptsRanges(): boolean {
    return this.#first.acceptsRanges;
  }

  /**
   * The place that is asked first has refused a range: it is asked for whole blobs only from now
   * on.
   */
  giveUpRanges(): void {
    this.#first.giveUpRanges();
  }

  /** The place that is asked first, as things stand. */
  get #first(): Endpoint {
    return this.#usableMirrors()[0] ?? this.#home;
  }

  #usableMirrors(): Endpoint[] {
    const { mirrorFaults } = this.#session;
    const isUsable = ([endpoint, mirror]: [Endpoint, Mirror]) =>
      !this.#passedOver.has(endpoint) && !mirrorFaults.isOutOfOrder(mirror);
    return [...this.#mirrors].filter(isUsable).map(([endpoint]) => endpoint);
  }

  /**
   * `check` throws for what is no manifest that makes sense: a mirror's word for a tag is not taken
   * then.
   */
  manifest(
    tagOrDigest: string,
    check: (manifest: FetchedManifest) => unknown = ignore,
  ): Promise<FetchedManifest> {
    const known = isDigest(tagOrDigest) ? this.#manifests.get(tagOrDigest) : undefined;
    if (known) return known;

    const fetching = this.#fetchManifest(tagOrDigest, check);
    if (!isDigest(tagOrDigest)) return fetching;
    this.#manifests.set(tagOrDigest, fetching);
    fetching.catch(() => this.#manifests.delete(tagOrDigest));
    return fetching;
  }

  async #fetchManifest(
    tagOrDigest: string,
    check: (manifest: FetchedManifest) => unknown,
    kind: ContentKind = "manifest",
  ): Promise<FetchedManifest> {
    const ask = () =>
      this.#ask({ kind, name: tagOrDigest }, async (endpoint) => {
        const fetched = await endpoint.manifest(tagOrDigest, kind);
        if (endpoint !== this.#home) check(fetched);
        return fetched;
      });
    const manifest = await this.#withinBudget(ask);
    this.#manifests.set(manifest.digest, Promise.resolve(manifest));
    return manifest;
  }

  /** A config before its turn, where the platform stands nowhere else. */
  async config({ digest, size, data }: Descriptor): Promise<Buffer> {
    if (data) return data;
    const { bytes } = await this.#withinBudget(() => this.#smallBlob(digest, size));
    return bytes;
  }

  /** A blob of at most a config's size that is looked at and let go: it is not counted. */
  async signature({ digest, size, data }: Descriptor): Promise<Buffer> {
    if (data) return data;
    const { bytes } = await withRetries(this.#session, () => this.#smallBlob(digest, size));
    return bytes;
  }

  #smallBlob(digest: string, size: number) {
    return this.#ask({ kind: "blob", name: digest }, async (endpoint) => {
      const document = await endpoint.document("blob", digest, LIMITS.configBytes);
      const actual = document.bytes.length;
      if (actual === size) return document;
      return fail("SIZE_MISMATCH", `${document.where}: ${actual} bytes, not ${size}`);
    });
  }

  /** A document of those that one pull may hold in memory. */
  async #withinBudget<T extends { bytes: Buffer }>(attempt: () => Promise<T>): Promise<T> {
    const { budget } = this.#session;
    budget.check(this.reference);
    const document = await withRetries(this.#session, attempt);
    budget.add(document.bytes, this.reference);
    return document;
  }

  /** What HEAD tells of a manifest; undefined where something is left out. */
  head(tagOrDigest: string): Promise<ManifestHead | undefined> {
    const wanted = { kind: "manifest", name: tagOrDigest } as const;
    return withRetries(this.#session, () =>
      this.#ask(wanted, (endpoint) => endpoint.head(tagOrDigest)),
    );
  }

  /** The pages of the referrers endpoint; undefined where there is no such endpoint. */
  async referrers(digest: string): Promise<Buffer[] | undefined> {
    const wanted = { kind: "referrer", name: digest } as const;
    try {
      return await this.#ask(wanted, (endpoint) => endpoint.referrers(digest));
    } catch (error) {
      if (!isWithoutEndpoint(error)) throw error;
      this.#noteDenial(
        "referrer",
        error,
        "asking for the tag that stands for its list of referrers",
      );
      return undefined;
    }
  }

  /**
   * What a tag for proof names; undefined where there is none. Artifactory denies tags that are not
   * there (cosign#2973).
   */
  async proof(tag: string): Promise<FetchedManifest | undefined> {
    try {
      return await this.#fetchManifest(tag, ignore, "proof");
    } catch (error) {
      const isAbsent = error instanceof ImgpullError && [401, 403, 404].includes(error.status ?? 0);
      if (!isAbsent) throw error;
      this.#noteDenial("proof", error, "taken as not there");
      return undefined;
    }
  }

  /** Where proof was denied, since what is denied may be there all the same. */
  get denial(): string | undefined {
    return this.#denials.get("proof") ?? this.#denials.get("referrer");
  }

  #noteDenial(kind: ContentKind, { message, status }: ImgpullError, outcome: string): void {
    if (status === 404 || this.#denials.has(kind)) return;
    this.#denials.set(kind, firstLineOf(message));
    this.#session.warn(`${firstLineOf(message)}; ${outcome}`);
  }

  /**
   * One answer, with a body, to a request for a blob's bytes [from, to). The caller checks what
   * comes.
   */
  async blob(
    descriptor: Descriptor,
    from: number,
    to: number,
    signal: AbortSignal,
  ): Promise<Answer> {
    const { digest, size } = descriptor;
    const isRanged = from > 0 || to < size;
    const headers: Record<string, string> = isRanged ? { Range: `bytes=${from}-${to - 1}` } : {};
    const more = { headers, signal, isBlob: true };

    const isElsewhere = (descriptor.urls?.length ?? 0) > 0;
    const wanted = { kind: "blob", name: digest, isRanged, isElsewhere } as const;
    try {
      return await this.#ask(wanted, async (endpoint, isLastChance) => {
        const answer = await endpoint.request("GET", "blob", digest, more);
        const isMirrors = endpoint !== this.#home && !isLastChance;
        if (isMirrors) this.#rememberAnswer(digest, endpoint);
        return answer;
      });
    } catch (refusal) {
      const isMissing = refusal instanceof ImgpullError && refusal.code === "NOT_FOUND";
      if (!isMissing) throw refusal;
      return this.#foreignBlob(descriptor, headers, signal, refusal);
    }
  }

  /**
   * Whether another place is asked for a blob after `error`: what its reader got was wrong, or
   * broke off. A mirror that gave wrong bytes is not asked again; the registry itself has no other
   * place beside it.
   */
  canAskElsewhere(digest: string, error: unknown): boolean {
    if (!isMirrorsFailure(error)) return false;
    const answers = this.#mirrorAnswers.get(digest) ?? [];
    if (error.code === "DIGEST_MISMATCH") {
      for (const { mirror } of answers) this.#passOver(mirror, error);
      return this.#mirrorAnswers.delete(digest);
    }

    const failed = answers.findLast(({ hasFailed }) => !hasFailed);
    if (!failed) return false;
    failed.hasFailed = true;
    const { mirror } = failed;
    if (!this.#usableMirrors().includes(mirror)) return true; // another connection has met the same
    if (this.#isForgiven(mirror, error)) return false;
    this.#passOver(mirror, error);
    return true;
  }

  #rememberAnswer(digest: string, mirror: Endpoint): void {
    const answers = this.#mirrorAnswers.get(digest) ?? [];
    answers.push({ mirror, hasFailed: false });
    this.#mirrorAnswers.set(digest, answers);
  }

  /** From the first place that can give it. */
  async #ask<T>(wanted: Wanted, attempt: Attempt<T>): Promise<T> {
    for (const mirror of this.#usableMirrors()) {
      try {
        return await attempt(mirror);
      } catch (error) {
        if (!this.#canGoOnWithout(mirror, wanted, error)) throw error;
      }
    }

    try {
      return await attempt(this.#home);
    } catch (refusal) {
      const isElsewhere = isProof(wanted.kind) || wanted.isElsewhere === true;
      if (isElsewhere || !isMirrorsFailure(refusal)) throw refusal;
      return this.#askLost(attempt, refusal);
    }
  }

  /**
   * What the registry itself does not give may still be at a mirror that has served, and was passed
   * over for what passes by itself. Its failures cost attempts now.
   */
  async #askLost<T>(attempt: Attempt<T>, refusal: ImgpullError): Promise<T> {
    const { mirrorFaults } = this.#session;
    for (const [endpoint, mirror] of this.#mirrors) {
      if (!mirrorFaults.isLost(mirror)) continue;
      try {
        return await attempt(endpoint, true);
      } catch (error) {
        if (!isMirrorsFailure(error) || isPassing(error)) throw error;
      }
    }
    throw refusal;
  }

  /**
   * What a mirror's failure means: the next place is asked, or its caller decides as for any
   * registry.
   */
  #canGoOnWithout(mirror: Endpoint, { kind, name, isRanged }: Wanted, error: unknown): boolean {
    if (!isMirrorsFailure(error)) return false;

    const isMissing = error.code === "NOT_FOUND" || (isProof(kind) && isWithoutEndpoint(error));
    if (isMissing && mirror.hasServed) {
      const isExpected = !isProof(kind) && isDigest(name);
      if (isExpected) this.#tellOf(mirror, error);
      return true;
    }

    if (isRanged && mirror.acceptsRanges && isRangeRefusal(error)) return false;
    if (this.#isForgiven(mirror, error)) return false;
    this.#passOver(mirror, error);
    return true;
  }

  /**
   * Whether a mirror that failed is asked again: what passes by itself is forgiven a few times,
   * once the mirror has served. That costs an attempt, of which the next places need some.
   */
  #isForgiven(mirror: Endpoint, error: ImgpullError): boolean {
    const most = Math.min(LIMITS.mirrorFailures, Math.floor(this.#session.settings.retries / 2));
    if (!mirror.hasServed || !isPassing(error) || this.#forgiven >= most) return false;
    this.#forgiven += 1;
    return true;
  }

  #passOver(endpoint: Endpoint, error: ImgpullError): void {
    const mirror = this.#mirrors.get(endpoint);
    this.#passedOver.add(endpoint);
    if (mirror) this.#session.mirrorFaults.note(mirror, error, endpoint.hasServed);
    this.#tellOf(endpoint, error);
  }

  #tellOf(endpoint: Endpoint, { message }: ImgpullError): void {
    const { mirrorFaults, warn } = this.#session;
    const mirror = this.#mirrors.get(endpoint);
    if (!mirror || !mirrorFaults.isFirst(mirror)) return;

    const endpoints = [...this.#mirrors.keys()];
    const later = endpoints.slice(endpoints.indexOf(endpoint) + 1);
    const next = later.find((each) => this.#usableMirrors().includes(each)) ?? this.#home;
    warn(`the mirror ${endpoint.name}: ${firstLineOf(message)}; asking ${next.name} instead`);
  }

  /**
   * A foreign layer that the registry has not, from its `urls`: over https, and without any
   * credential.
   */
  async #foreignBlob(
    { urls = [] }: Descriptor,
    headers: Record<string, string>,
    signal: AbortSignal,
    refusal: ImgpullError,
  ): Promise<Answer> {
    let failure = refusal;
    const mayAsk = (url: URL) => url.protocol === "https:" && !leadsInside(url, this.origin);

    const usable = urls.filter((url) => URL.canParse(url)).map((url) => new ForeignUrl(url));
    for (const url of usable) {
      if (!mayAsk(url)) continue;
      const answer = await this.#session.transport.send({
        method: "GET",
        url,
        headers,
        signal,
        isBlob: true,
        mayAsk,
        authorizationFor: async () => undefined,
        roleOf: () => "other",
      });
      if (answer.body) return answer;
      failure = statusError(answer, this.#session.clock.now(), "the foreign layer's host");
    }

    throw failure;
  }
}

/** A request to one place; to a mirror that was passed over, the last chance that there is. */
type Attempt<T> = (endpoint: Endpoint, isLastChance?: boolean) => Promise<T>;

/** What is asked for, by its tag or digest; of a blob perhaps a part. */
type Wanted = Readonly<{
  kind: ContentKind;
  name: string;
  isRanged?: boolean;
  isElsewhere?: boolean; // it has other places besides
}>;

/**
 * What is no fault of any registry: the end of the pull, our disk, a credential file that is
 * broken.
 */
const OUR_OWN: readonly ErrorCode[] = ["ABORTED", "DISK", "CREDENTIALS"];

const isMirrorsFailure = (error: unknown): error is ImgpullError =>
  error instanceof ImgpullError && !OUR_OWN.includes(error.code);

/** What may go better soon, at the same place. Wrong bytes are what it has. */
const isPassing = (error: ImgpullError): boolean =>
  !error.code.endsWith("MISMATCH") && retryDelayMs(error, 1, 1, 1) !== undefined;

/**
 * A registry without the referrers endpoint says 404; with less sense 400, 405, 406 (Artifactory,
 * go-containerregistry#2026) or even 401 (Harbor 2.7, harbor#18305).
 */
const isWithoutEndpoint = (error: unknown): error is ImgpullError =>
  error instanceof ImgpullError && [400, 401, 403, 404, 405, 406].includes(error.status ?? 0);

/**
 * Whether it may be the Range that a server or its storage host does not like: what it answers is
 * about as varied as servers are. Statuses that mean the same with and without one are left out.
 */
function isRangeRefusal(error: unknown): boolean {
  if (!(error instanceof ImgpullError)) return false;
  const { status = 0, retryAfterMs = 0 } = error;
  if ([401, 407, 408, 425, 429].includes(status)) return false;
  return status >= 400 && retryAfterMs === 0; // who says when to come back means the whole as well
}

/**
 * Where a `Link` header has the next page (RFC 8288), which is the registry's own business or
 * nobody's.
 */
function nextPage(header: string | string[] | undefined, url: URL): URL | undefined {
  const links = [header ?? []].flat().join(",");
  const [, target] = /<([^<>]*)>[^<]*;\s*rel="?next"?/i.exec(links) ?? [];
  if (target === undefined) return undefined;

  const next = URL.canParse(target, url) ? new ForeignUrl(target, url) : undefined;
  if (next?.origin !== url.origin)
    return fail("PROTOCOL", `${redactUrl(url)}: its next page is on another host`);
  const namespace = url.searchParams.get("ns");
  if (namespace !== null) next.searchParams.set("ns", namespace);
  return next;
}

/** What it is that a registry does not have. */
function missingWords(
  { words }: Answer,
  reference: Reference,
  kind: ContentKind,
  name: string,
): string {
  const place = placeOf(reference);
  if (/NAME_UNKNOWN|repository name not known/i.test(words)) return `repository: ${place}`;
  return isDigest(name) ? `${kind}: ${name}` : `tag: ${place}:${name}`;
}

/**
 * The digest of what was asked for by its tag, in the algorithm that the registry may know it by
 * alone.
 */
function digestByName(bytes: Buffer, header: unknown): string {
  const isRight = isDigest(header) && header === digestOf(bytes, header);
  return isRight ? header : digestOf(bytes);
}

/** One for each repository of a session. */
function registryOf(session: Session, reference: Reference): Registry {
  const key = placeOf(reference);
  const registry = session.registries.get(key) ?? new Registry(session, reference);
  session.registries.set(key, registry);
  return registry;
}

/**
 * The media type by the JSON itself, then by the header: registries label manifests text/plain and
 * worse.
 */
function sniffMediaType(bytes: Buffer, contentType = ""): string | undefined {
  const json = parseJson(bytes);
  if (!isRecord(json)) return undefined;
  if (typeof json.mediaType === "string") return json.mediaType;
  if (json.schemaVersion === 1) return DOCKER_SCHEMA_1;

  const named = MANIFEST_TYPES.find((type) => contentType.toLowerCase().startsWith(type));
  if (named) return named;
  if (Array.isArray(json.manifests)) return OCI_INDEX;
  return isRecord(json.config) ? OCI_MANIFEST : undefined;
}

// ====== 10. Manifests and platforms ======
// One shape for Docker and OCI. Everything that a registry says of digests and sizes is checked
// here.

// ------ Manifests ------

interface ImageManifest {
  readonly kind: "image";
  readonly config: Descriptor;
  readonly layers: readonly Descriptor[];
}

interface IndexManifest {
  readonly kind: "index";
  readonly manifests: readonly Descriptor[];
}

/**
 * Docker takes these for an image's config: registries once said so
 * (distribution/distribution#1621).
 */
const OLD_CONFIG_LABELS = ["", "text/html", "application/json", "application/octet-stream"];

function parseManifest(
  { bytes, mediaType }: FetchedManifest,
  where: string,
): ImageManifest | IndexManifest {
  const refuse = (code: ErrorCode, reason: string): never => fail(code, `${where}: ${reason}`);
  const json = parseJson(bytes);
  if (!isRecord(json)) return refuse("PROTOCOL", "the manifest is not a JSON object");

  const isSchema1 = json.schemaVersion === 1 || mediaType.startsWith(DOCKER_SCHEMA_1);
  if (isSchema1)
    refuse(
      "UNSUPPORTED",
      "a schema 1 manifest, which Docker itself has given up: push the image anew",
    );
  if (isAmbiguous(json, mediaType))
    refuse("PROTOCOL", `${outside(mediaType, 80)}: no manifest, or with fields of something else`);

  if (Array.isArray(json.manifests)) {
    if (json.manifests.length > LIMITS.indexEntries)
      refuse("TOO_LARGE", `more than ${LIMITS.indexEntries} entries`);
    const manifests = json.manifests.map((entry) => parseDescriptor(entry, where));
    return { kind: "index", manifests };
  }

  const config = parseDescriptor(json.config, where);
  if (config.size > LIMITS.configBytes)
    refuse("TOO_LARGE", `its config is larger than ${LIMITS.configBytes} bytes`);
  const isOldLabel = mediaType === DOCKER_MANIFEST && OLD_CONFIG_LABELS.includes(config.mediaType);
  if (isOldLabel) config.mediaType = CONFIG_TYPES[0] as string;
  const layers = ((json.layers ?? []) as unknown[]).map((layer) => parseDescriptor(layer, where));
  const falselyEmpty = [config, ...layers].find(isFalselyEmpty);
  if (falselyEmpty)
    refuse("PROTOCOL", `${falselyEmpty.digest} is said to have no bytes, and is not their digest`);
  return { kind: "image", config, layers };
}

/**
 * Neither an image nor an index, or both: one document that two readers read as two things
 * (CVE-2021-41190).
 */
function isAmbiguous(json: Record<string, unknown>, mediaType: string): boolean {
  const isIndex = Array.isArray(json.manifests);
  const hasLayers = Array.isArray(json.layers);
  const isImage = isRecord(json.config) && (hasLayers || (json.layers ?? null) === null);
  const isKnownType = MANIFEST_TYPES.includes(mediaType);
  const isOtherType = isKnownType && INDEX_TYPES.includes(mediaType) !== isIndex;
  return isIndex === isImage || (isIndex && hasLayers) || isOtherType;
}

/**
 * Nothing is asked for where there are no bytes, so nothing but this bounds how many such there can
 * be.
 */
const isFalselyEmpty = ({ digest, size }: Descriptor): boolean =>
  size === 0 && digestOf(Buffer.alloc(0), digest) !== digest;

/** A descriptor whose digest and size can be relied on to be a digest and a size. */
function parseDescriptor(value: unknown, where: string): Descriptor {
  const refuse = (reason: string): never => fail("PROTOCOL", `${where}: ${reason}`);
  if (!isRecord(value)) return refuse("a descriptor is not an object");

  const { mediaType, digest, size, urls, platform, annotations, data } = value;
  if (!isDigest(digest)) return refuse(`${quote(digest)} is not a digest that is safe to use`);
  const isSize = typeof size === "number" && Number.isSafeInteger(size) && size >= 0;
  if (!isSize)
    return refuse(`${digest} has the size ${quote(size)}, which is not a number of bytes`);

  const isUrlList = isStringList(urls) && urls.length > 0;
  return {
    mediaType: typeof mediaType === "string" ? mediaType : "",
    digest,
    size,
    ...dropEmpty({
      urls: isUrlList ? urls : undefined,
      platform: isRecord(platform) ? parsePlatform(platform) : undefined,
      annotations: isRecord(annotations) ? textsIn(annotations) : undefined,
      data: inlineContent(data, { digest, size }),
    }),
  };
}

/** A descriptor's `data`: some registries do not have the blob beside it (containerd#8076). */
function inlineContent(
  data: unknown,
  { digest, size }: Pick<Descriptor, "digest" | "size">,
): Buffer | undefined {
  if (typeof data !== "string") return undefined;
  const bytes = Buffer.from(data, "base64");
  return bytes.length === size && digestOf(bytes, digest) === digest ? bytes : undefined;
}

const textsIn = (value: Record<string, unknown>): Record<string, string> =>
  Object.fromEntries(
    Object.entries(value).filter(
      (entry): entry is [string, string] => typeof entry[1] === "string",
    ),
  );

/**
 * A value from outside as it stands in a sentence; never an object, which may be too deep for
 * JSON.stringify.
 */
function quote(value: unknown): string {
  const text = typeof value === "object" ? "an object" : (JSON.stringify(value) ?? "none");
  return outside(text, 100);
}

// ------ What is an image ------
// Charts, models, signatures, attestations and caches have manifests of the same form. Loaders take
// images only: one thing in manifest.json that is none, and none of a tar is loaded.

/** docker's and OCI's types of layers, which are tars: plain or compressed, foreign, encrypted. */
const LAYER_TYPE =
  /^application\/vnd\.(docker\.image\.rootfs(\.foreign)?\.diff\.tar(\.gzip|\.zstd)?|oci\.image\.layer(\.nondistributable)?\.v1\.tar(\+gzip|\+zstd)?(\+encrypted)?)$/;
const isTarLayer = ({ mediaType }: Descriptor): boolean => LAYER_TYPE.test(mediaType);

/** What an image's config says that counts here. */
type ConfigWords = Readonly<{
  isObject: boolean;
  /** Empty where it names none. */
  platform: string;
  /** Undefined where it has no such list at all. */
  diffIds: readonly unknown[] | undefined;
}>;

function configWords(json: unknown): ConfigWords {
  if (!isRecord(json)) return { isObject: false, platform: "", diffIds: undefined };
  const { rootfs } = json;
  const diffIds = isRecord(rootfs) ? rootfs.diff_ids : undefined;
  const isList = Array.isArray(diffIds);
  return {
    isObject: true,
    platform: formatPlatform(parsePlatform(json)),
    diffIds: isList || diffIds === undefined ? diffIds : [diffIds],
  };
}

const hasOneDiffIdEach = ({ diffIds = [] }: ConfigWords, layerCount: number): boolean =>
  diffIds.length === layerCount && diffIds.every(isDigest);

/** An image by its manifest: an image's config, and layers that are tars. */
const claimsImage = ({ config, layers }: ImageManifest): boolean =>
  CONFIG_TYPES.includes(config.mediaType) && layers.every(isTarLayer);

/** An image: where its config is known, that has one diff_id for each layer. */
const isImage = (manifest: ImageManifest, config?: ConfigWords): boolean =>
  claimsImage(manifest) && (!config || hasOneDiffIdEach(config, manifest.layers.length));

/** The same of what a reference came to. */
const isImageContent = ({ manifest, configBytes }: ImageContent): boolean =>
  isImage(manifest, configBytes && configWords(parseJson(configBytes)));

// ------ Platforms ------

function parsePlatform(value: Record<string, unknown>): Platform {
  const word = (name: string): string => {
    const { [name]: text = "" } = value;
    if (typeof text !== "string") return "";
    return text.length > 64 ? "…" : printable(text); // a part could be one of a secret
  };
  return {
    os: word("os"),
    architecture: word("architecture"),
    ...dropEmpty({ variant: word("variant") }),
  };
}

/** This machine, in Go's words. */
function hostPlatform(): Platform {
  const { arch, platform } = process;
  const ppc64 = os.endianness() === "LE" ? "ppc64le" : "ppc64";
  const systems: Record<string, string> = { win32: "windows", sunos: "solaris" };
  const processors: Record<string, string> = { x64: "amd64", ia32: "386", mipsel: "mipsle", ppc64 };
  const { arm_version: version = "7" } = process.config.variables as { arm_version?: string };
  const variant = arch === "arm" ? `v${version}` : undefined;
  return {
    os: systems[platform] ?? platform,
    architecture: processors[arch] ?? arch,
    ...dropEmpty({ variant }),
  };
}

/**
 * The platform to look for: what was asked, the rest from this machine (whose variant goes with its
 * processor).
 */
function wantedPlatform(wanted: Partial<Platform>, host = hostPlatform()): Platform {
  const variant = wanted.variant ?? (wanted.architecture === undefined ? host.variant : undefined);
  return {
    os: wanted.os ?? host.os,
    architecture: wanted.architecture ?? host.architecture,
    ...dropEmpty({ variant }),
  };
}

/** Processors whose variants are levels, each of which runs what was made for those below it. */
const VARIANT_LEVELS: Readonly<Record<string, { lowest: number; unnamed: number }>> = {
  arm: { lowest: 5, unnamed: 7 }, // `unnamed` is what no variant means
  arm64: { lowest: 8, unnamed: 8 },
  amd64: { lowest: 1, unnamed: 1 },
};

const NO_VARIANT = "";
const ANY_VARIANT = "*";

/** Variants that serve, best first. containerd's platforms package has the same order. */
function acceptableVariants(architecture: string, variant: string | undefined): string[] {
  const levels = VARIANT_LEVELS[architecture];
  if (!levels) return variant === undefined ? [NO_VARIANT, ANY_VARIANT] : [variant];

  const exact = variant ?? NO_VARIANT;
  const [, digits] = /^v(\d{1,2})$/.exec(variant ?? `v${levels.unnamed}`) ?? [];
  if (digits === undefined) return [exact];

  const acceptable = [exact];
  for (let level = Number(digits); level >= levels.lowest; level -= 1) {
    acceptable.push(`v${level}`);
    if (level === levels.unnamed) acceptable.push(NO_VARIANT);
  }
  return acceptable;
}

/** The entry that serves a platform best. */
function matchPlatform(
  candidates: readonly Descriptor[],
  { os: system, architecture, variant }: Platform,
): Descriptor | undefined {
  const fitting = candidates.filter(
    ({ platform }) => platform?.os === system && platform.architecture === architecture,
  );

  for (const acceptable of acceptableVariants(architecture, variant)) {
    const match = fitting.find(
      ({ platform }) =>
        acceptable === ANY_VARIANT || (platform?.variant ?? NO_VARIANT) === acceptable,
    );
    if (match) return match;
  }
  return undefined;
}

const isAttestation = ({ platform }: { platform?: Platform }): boolean =>
  platform?.os === "unknown" || platform?.architecture === "unknown";

// ------ Resolving a reference ------

/**
 * One image of a reference. Its config is read already where the platform had to be looked up in
 * it.
 */
interface ImageContent {
  readonly manifest: ImageManifest;
  readonly platform?: Platform;
  readonly configBytes?: Buffer;
}

/**
 * What travels with an image and is none: what refers to `subject`, or the index above it that such
 * proof is of.
 */
type Companion = Readonly<{
  registry: Registry;
  top: FetchedManifest;
  manifests: readonly FetchedManifest[];
  contents: readonly ImageContent[];
  subject: string;
  isIndex?: boolean;
  artifactType?: string;
  kind?: string;
}>;

/**
 * What one reference came to: the manifests to keep, `top` (what index.json points at) first, and
 * the images.
 */
type ResolvedImage = Readonly<{
  reference: Reference;
  name: string;
  registry: Registry;
  /** What the reference itself names: `top`, or the index that it was chosen from. */
  asked: FetchedManifest;
  companions?: readonly Companion[];
  /** Which of the two `cosign verify --local-image` is to check, and as what. */
  kind?: string;
  top: FetchedManifest;
  manifests: readonly FetchedManifest[];
  contents: readonly ImageContent[];
  /** What an index names beside manifests. */
  blobs?: readonly Descriptor[];
  platform: string;
}>;

const versionOf = ({ tag, digest }: Reference): string => digest ?? (tag as string);

/**
 * Which images of an index: that for the platform wanted, all of them, or those for several
 * platforms.
 */
type PlatformChoice = "one" | "all" | readonly Partial<Platform>[];

/**
 * The manifests for one reference: the platform's, or several of them with the index that names
 * them.
 */
async function resolveImage(
  session: Session,
  reference: Reference,
  name: string,
  choice: PlatformChoice,
): Promise<ResolvedImage> {
  const where = formatReference(reference);
  const registry = registryOf(session, reference);
  const parse = (manifest: FetchedManifest) => parseManifest(manifest, where);
  const asked = await registry.manifest(versionOf(reference), parse);
  const parsed = parse(asked);
  const source = { registry, where, asked };
  const found = await findImages();

  // What has no tag is named by the digest that DEST holds, so that the printed line gives the same
  // name again.
  const finalName = name.replace(/@.*$/, `@${found.top.digest}`);
  return { reference, registry, name: finalName, asked, ...found };

  async function findImages(): Promise<FoundImages> {
    const readChild = childrenOf(registry, where);
    if (choice === "all") {
      const { concurrency } = session.settings;
      const all = await collectAll(readChild, concurrency, where, asked);
      return { top: asked, platform: "all", ...all };
    }
    if (choice !== "one") return findImagesFor(session, source, choice);
    if (parsed.kind === "image") return findLoneImage(session, source, parsed);
    return findImageOfIndex(session, readChild, where, parsed);
  }
}

/** What a reference names, where that is, and what the reference is called in messages. */
type NamedManifest = Readonly<{ registry: Registry; where: string; asked: FetchedManifest }>;

type FoundImages = Pick<ResolvedImage, "top" | "manifests" | "contents" | "blobs" | "platform">;

/** A reference that names one image, whose platform stands in its config. */
async function findLoneImage(
  session: Session,
  { registry, where, asked: top }: NamedManifest,
  manifest: ImageManifest,
): Promise<FoundImages> {
  const isConfig = CONFIG_TYPES.includes(manifest.config.mediaType);
  const configBytes = isConfig ? await registry.config(manifest.config) : undefined;
  const config = configBytes && parseJson(configBytes);
  if (configBytes && claimsImage(manifest) && !isRecord(config))
    fail("PROTOCOL", `${formatReference(registry.reference)}: its config is not a JSON object`);
  const platform = isRecord(config) && config.os ? parsePlatform(config) : undefined;
  if (platform) checkPlatform(session, where, platform);

  const content = { manifest, ...dropEmpty({ platform, configBytes }) };
  return { top, manifests: [top], contents: [content], platform: formatPlatform(platform) };
}

/**
 * A single image for another platform than the one asked for is an error; than this machine's, a
 * warning.
 */
function checkPlatform({ settings, warn }: Session, where: string, platform: Platform): void {
  const { wanted } = settings;
  const asked = { ...platform, ...wanted };
  const entry: Descriptor = { mediaType: "", digest: "", size: 0, platform };
  const what = `it is one image, for ${outside(formatPlatform(platform))}`;
  if (!matchPlatform([entry], asked))
    fail("NO_PLATFORM", `${where} has no image for ${outside(formatPlatform(asked))}\n  ${what}`);

  const host = wantedPlatform(wanted);
  const isForHost =
    platform.architecture === host.architecture && ["linux", host.os].includes(platform.os);
  if (!isForHost) warn(`${where}: ${what}, not for this machine`);
}

/** Fetches what an index names; undefined where it is not to be had. */
type ChildReader<T = FetchedManifest | undefined> = (descriptor: Descriptor) => Promise<T>;

/** From the registry; the size is the index's word, and checked. */
function childrenOf(registry: Registry, where: string): ChildReader<FetchedManifest> {
  const asked = new Set<string>();
  return async (descriptor) => {
    const { digest, size, data, mediaType } = descriptor;
    asked.add(digest);
    if (asked.size > LIMITS.manifests)
      fail("TOO_LARGE", `${where}: its indexes name more than ${LIMITS.manifests} manifests`);
    if (data)
      return { digest, bytes: data, mediaType: sniffMediaType(data, mediaType) ?? mediaType };

    const child = await registry.manifest(digest);
    if (child.bytes.length === size) return child;
    const actual = `${child.bytes.length} bytes, not ${size}`;
    return fail("SIZE_MISMATCH", `${where}: ${digest} has ${actual}`);
  };
}

function checkLayers(contents: readonly ImageContent[], where: string): void {
  if (sumOf(contents, ({ manifest }) => manifest.layers.length) > LIMITS.layers)
    fail("TOO_LARGE", `${where}: more than ${LIMITS.layers} layers`);
}

function checkDepth(depth: number, where: string): void {
  if (depth > LIMITS.indexDepth)
    fail("TOO_LARGE", `${where}: indexes inside indexes, more than ${LIMITS.indexDepth} deep`);
}

/** The image of an index for the wanted platform. */
async function findImageOfIndex(
  session: Session,
  readChild: ChildReader<FetchedManifest>,
  where: string,
  index: IndexManifest,
): Promise<FoundImages> {
  const entry = await findPlatform(session, readChild, where, index);
  const top = await readChild(entry);
  const manifest = parseManifest(top, where);
  if (manifest.kind !== "image")
    return fail("PROTOCOL", `${where}: ${top.digest} is an index, and not said to be`);

  const { platform } = entry;
  const content = { manifest, ...dropEmpty({ platform }) };
  return { top, manifests: [top], contents: [content], platform: formatPlatform(platform) };
}

/**
 * The entry for the wanted platform, of an index or of those inside it, level by level. An
 * operating system that was not asked for may be linux in its stead. NO_PLATFORM names the
 * platforms that there are.
 */
async function findPlatform(
  session: Session,
  readChild: ChildReader<FetchedManifest>,
  where: string,
  top: IndexManifest,
): Promise<Descriptor> {
  const { settings, warn } = session;
  const host = wantedPlatform(settings.wanted);
  const onLinux = settings.wanted.os === undefined ? { ...host, os: "linux" } : host;
  const images: Descriptor[] = [];
  let level = [top];

  for (let depth = 1; level.length > 0; depth += 1) {
    checkDepth(depth, where);
    const listed = level.flatMap(({ manifests }) => manifests);
    const entries = listed.filter((entry) => !isAttestation(entry) && isManifestType(entry));
    const nested = entries.filter(isIndex);
    images.push(...entries.filter((entry) => !isIndex(entry)));

    const match = matchPlatform(images, host) ?? loneEntry(entries);
    if (match) return match;

    const mayHold = nested.filter(
      (entry) =>
        !entry.platform?.os || matchPlatform([entry], host) || matchPlatform([entry], onLinux),
    );
    const children = await mapConcurrently(mayHold, settings.concurrency, readChild);
    const manifests = children.map((child) => parseManifest(child, where));
    level = manifests.filter((manifest) => manifest.kind === "index");
  }

  const second = matchPlatform(images, onLinux);
  if (second) {
    warn(`${where} has nothing for ${host.os}: taking linux`);
    return second;
  }
  const names = images.map(({ platform }) => formatPlatform(platform)).filter(Boolean);
  const choices =
    names.length > 0
      ? `it has: ${outside([...new Set(names)].join(", "), 1000)} (\`platforms\`)`
      : "it has none for any platform, but cache or artifacts: `platforms` all takes them";
  return fail("NO_PLATFORM", `${where} has no image for ${formatPlatform(host)}\n  ${choices}`);
}

const isIndex = ({ mediaType }: Descriptor): boolean => INDEX_TYPES.includes(mediaType);

/**
 * What an index names is a manifest, unless its type says that it is something else: BuildKit lists
 * layers and a config of its own in the index of its cache (containers/image#2210).
 */
const isManifestType = ({ mediaType }: Descriptor): boolean =>
  mediaType === "" || MANIFEST_TYPES.includes(mediaType) || mediaType.startsWith(DOCKER_SCHEMA_1);

/**
 * An image that is the only entry, and of which no platform is said, or an empty one, is for all of
 * them.
 */
function loneEntry(entries: readonly Descriptor[]): Descriptor | undefined {
  const [entry] = entries;
  if (entries.length !== 1 || !entry || isIndex(entry)) return undefined;
  return formatPlatform(entry.platform) === "" ? entry : undefined;
}

/** The indexes that lead from one to a manifest, outermost first; undefined where none does. */
async function pathTo(
  digest: string,
  from: FetchedManifest,
  readChild: ChildReader,
  where: string,
): Promise<FetchedManifest[] | undefined> {
  return search(from, 0);

  async function search(
    fetched: FetchedManifest,
    depth: number,
  ): Promise<FetchedManifest[] | undefined> {
    checkDepth(depth, where);
    const manifest = parseManifest(fetched, where);
    if (manifest.kind === "image") return undefined;
    if (manifest.manifests.some((entry) => entry.digest === digest)) return [fetched];

    for (const entry of manifest.manifests.filter(isIndex)) {
      const child = await readChild(entry);
      const below = child && (await search(child, depth + 1));
      if (below) return [fetched, ...below];
    }
    return undefined;
  }
}

/** The images for several platforms, under the index that names them, which is kept as it is. */
async function findImagesFor(
  session: Session,
  source: NamedManifest,
  platforms: readonly Partial<Platform>[],
): Promise<FoundImages> {
  const { registry, where, asked: top } = source;
  const readChild = childrenOf(registry, where);
  const parsed = parseManifest(top, where);
  // One after the other, so that every platform that is missing is named.
  const found = await mapConcurrently(platforms, 1, (wanted) => {
    const wanting = { ...session, settings: { ...session.settings, wanted } };
    return parsed.kind === "image"
      ? findLoneImage(wanting, source, parsed)
      : findImageOfIndex(wanting, readChild, where, parsed);
  });

  const images = new Map(found.map((image) => [image.top.digest, image]));
  const entries = parsed.kind === "index" ? parsed.manifests.map(({ digest }) => digest) : [];
  const placed = await mapConcurrently([...images.values()], 1, async (image) => {
    const indexes = (await pathTo(image.top.digest, top, readChild, where)) ?? [];
    return { ...image, indexes, place: entries.indexOf((indexes[1] ?? image.top).digest) };
  });
  // In the index's order, so that the same platforms give the same bytes.
  const ordered = placed.sort((left, right) => left.place - right.place);
  const kept = [top, ...ordered.flatMap((image) => [...image.indexes, image.top])];
  const manifests = new Map(kept.map((each) => [each.digest, each]));
  if (parsed.kind === "index") warnOfPartialIndex(session, where, parsed, manifests);

  const platform = ordered.map((image) => image.platform).join(",");
  const contents = ordered.flatMap((image) => image.contents);
  return { top, manifests: [...manifests.values()], contents, platform };
}

/** docker, podman and ctr load a part of an index; some commands want all of it. */
function warnOfPartialIndex(
  { warn }: Session,
  where: string,
  { manifests: entries }: IndexManifest,
  kept: ReadonlyMap<string, unknown>,
): void {
  const missing = entries.filter(({ digest }) => !kept.has(digest));
  if (missing.length === 0) return;

  const platforms = entries.filter((entry) => !isAttestation(entry));
  const taken = platforms.filter(({ digest }) => kept.has(digest));
  const without = missing.every(isAttestation) ? ", without their attestations" : "";
  warn(
    `${where}: ${taken.length} of ${counted(platforms.length, "platform")}${without}: ` +
      "ctr --all-platforms, skopeo --all and crane push of a folder want the whole index",
  );
}

/**
 * All that an index names, its own manifest first, and the images in it, attestations last. What
 * `readChild` has not is left out.
 */
async function collectAll(
  readChild: ChildReader,
  limit: number,
  where: string,
  top: FetchedManifest,
) {
  const manifests = new Map([[top.digest, top]]);
  const contents: (ImageContent & { digest: string })[] = [];
  const blobs: Descriptor[] = [];

  await collect(top, 0);
  contents.sort((left, right) => Number(isAttestation(left)) - Number(isAttestation(right)));
  return { manifests: [...manifests.values()], contents, blobs };

  async function collect(
    fetched: FetchedManifest,
    depth: number,
    platform?: Platform,
  ): Promise<void> {
    checkDepth(depth, where);
    const { digest } = fetched;
    const manifest = parseManifest(fetched, where);
    if (manifest.kind === "image") {
      contents.push({ digest, manifest, ...dropEmpty({ platform }) });
      checkLayers(contents, where);
      return;
    }

    blobs.push(...manifest.manifests.filter((entry) => !isManifestType(entry)));
    const entries = manifest.manifests.filter(
      (entry) => isManifestType(entry) && !manifests.has(entry.digest),
    );
    const children = await mapConcurrently(entries, limit, readChild);
    for (const [at, child] of children.entries()) {
      if (!child || manifests.has(child.digest)) continue;
      manifests.set(child.digest, child);
      await collect(child, depth + 1, entries[at]?.platform);
    }
  }
}

// ====== 11. Tar ======
// POSIX pax: a pure header encoder, the plan of a whole tar before its first byte, a reader for any
// tar. Invariant: the same digests give the same plan, and the plan gives the same bytes, on every
// machine.

// ------ Header ------

const BLOCK = 512;
const CHECKSUM_AT = 148;
const CHECKSUM_BYTES = 8;
/** What eleven octal digits hold. */
const LARGEST_USTAR_SIZE = 0o77777777777;
const LONGEST_USTAR_NAME = 100;

const paddingOf = (sizeBytes: number): number => (BLOCK - (sizeBytes % BLOCK)) % BLOCK;

/** The sum of a header's bytes, where those of the checksum itself count as spaces. */
function checksumOf(header: Buffer): number {
  let sum = CHECKSUM_BYTES * 0x20;
  for (let at = 0; at < BLOCK; at += 1) {
    const isChecksum = at >= CHECKSUM_AT && at < CHECKSUM_AT + CHECKSUM_BYTES;
    if (!isChecksum) sum += header[at] ?? 0;
  }
  return sum;
}

/** The ustar header of a file, a folder or an extended header; name and size must fit. */
function encodeUstarHeader(name: string, sizeBytes: number, type: "0" | "5" | "x"): Buffer {
  const octal = (value: number, digits: number) => value.toString(8).padStart(digits, "0");
  const fields: [widthBytes: number, text: string][] = [
    [100, name],
    [8, octal(type === "5" ? 0o755 : 0o644, 7)],
    [8, octal(0, 7)], // user
    [8, octal(0, 7)], // group
    [12, octal(sizeBytes, 11)],
    [12, octal(0, 11)], // time of the last change
    [CHECKSUM_BYTES, ""],
    [1, type],
    [100, ""], // what a link leads to
    [6, "ustar"],
    [2, "00"],
    [32, ""], // the user's name
    [32, ""], // the group's name
    [8, octal(0, 7)], // device, major
    [8, octal(0, 7)], // device, minor
    [155, ""], // prefix of the name
  ];

  const header = Buffer.alloc(BLOCK);
  let offset = 0;
  for (const [widthBytes, text] of fields) {
    header.write(text, offset, "latin1");
    offset += widthBytes;
  }

  header.write(`${octal(checksumOf(header), 6)}\0 `, CHECKSUM_AT, "latin1");
  return header;
}

/** `LENGTH KEY=VALUE` and a line end, where the length counts its own digits. */
function encodePaxRecord(key: string, value: string): string {
  const rest = ` ${key}=${value}\n`;
  const withGuess = rest.length + String(rest.length).length;
  return `${rest.length + String(withGuess).length}${rest}`;
}

/**
 * Header of an entry, a folder where its name ends in "/"; names above 100 bytes and sizes from 8
 * GiB need a pax extended header before it.
 */
function encodeTarHeader(name: string, sizeBytes: number): Buffer {
  const isLong = name.length > LONGEST_USTAR_NAME;
  const isLarge = sizeBytes > LARGEST_USTAR_SIZE;
  const shortName = name.slice(0, LONGEST_USTAR_NAME);
  const type = name.endsWith("/") ? "5" : "0";
  const header = encodeUstarHeader(shortName, isLarge ? 0 : sizeBytes, type);
  if (!isLong && !isLarge) return header;

  const records = [
    isLong ? encodePaxRecord("path", name) : "",
    isLarge ? encodePaxRecord("size", String(sizeBytes)) : "",
  ].join("");
  const extension = Buffer.alloc(records.length + paddingOf(records.length));
  extension.write(records, "latin1");
  return Buffer.concat([
    encodeUstarHeader("PaxHeaders/blob", records.length, "x"),
    extension,
    header,
  ]);
}

// ------ Plan ------

/** A blob that a registry has, and is to be fetched from. */
type RemoteBlob = Readonly<{ descriptor: Descriptor; registry: Registry }>;

/** What one file of the tar or folder holds: bytes that are here already, or a blob. */
type FileContent = Readonly<{ sizeBytes: number; bytes?: Buffer; blob?: RemoteBlob }>;

/**
 * One file of the tar or folder. Its content begins at `offset` of the tar; `lead` is the padding
 * of the entry before and this one's header.
 */
type PlanEntry = FileContent & Readonly<{ name: string; lead: Buffer; offset: number }>;

/**
 * What a plan takes beside the images, as it is: entries of index.json after the images', and what
 * they lead to.
 */
type PlanExtras = Readonly<{
  indexEntries?: readonly unknown[];
  documents?: readonly Readonly<{ digest: string; bytes: Buffer }>[];
  blobs?: readonly RemoteBlob[];
}>;

const blobPath = (digest: string): string => `blobs/${digest.replace(":", "/")}`;

/** Where an index has an image's name: containerd reads the first, skopeo and podman the second. */
const NAME_KEYS = ["io.containerd.image.name", "org.opencontainers.image.ref.name"] as const;

function indexEntry({ name, top, kind }: ResolvedImage): unknown {
  const names = Object.fromEntries(NAME_KEYS.map((key) => [key, name]));
  const annotations = { ...names, ...dropEmpty({ kind }) };
  return { mediaType: top.mediaType, digest: top.digest, size: top.bytes.length, annotations };
}

/**
 * The one image of a reference that manifest.json lists: classic docker keeps the last of several
 * under one name.
 */
function dockerImageOf({ contents }: ResolvedImage): ImageContent | undefined {
  const images = contents.filter(isImageContent);
  const usual = images.find(({ platform }) => formatPlatform(platform) === "linux/amd64");
  return usual ?? images[0];
}

/** manifest.json's entry, what `docker load` reads. Classic docker cannot name a digest. */
function dockerEntry(image: ResolvedImage): unknown {
  const chosen = dockerImageOf(image);
  if (!chosen) return undefined;

  const { config, layers } = chosen.manifest;
  return {
    Config: blobPath(config.digest),
    RepoTags: image.name.includes("@") ? [] : [image.name],
    Layers: layers.map(({ digest }) => blobPath(digest)),
  };
}

/** An entry of manifest.json that anyone wrote. */
function parseDockerEntry(
  value: unknown,
): { config: string; tags: readonly string[]; layers: readonly string[] } | undefined {
  if (!isRecord(value)) return undefined;
  const { Config: config, RepoTags, Layers } = value;
  const tags = RepoTags ?? [];
  const layers = Layers ?? [];
  if (typeof config !== "string" || !isStringList(tags) || !isStringList(layers)) return undefined;
  return { config, tags, layers };
}

/** The files of a plan, each once and in order; the layers that are left out beside them. */
class PlannedFiles {
  readonly files = new Map<string, FileContent>();
  readonly omitted = new Map<string, Descriptor>();

  addBytes(name: string, bytes: Buffer): void {
    this.files.set(name, { sizeBytes: bytes.length, bytes });
  }

  addBlob(blob: RemoteBlob, bytes = blob.descriptor.data): void {
    const { digest, size } = blob.descriptor;
    const name = blobPath(digest);
    const planned = this.files.get(name);
    const plannedBytes = planned?.sizeBytes ?? size;
    if (plannedBytes !== size)
      fail("SIZE_MISMATCH", `${digest} is said to have ${size} bytes here, ${plannedBytes} there`);

    if (planned) return;
    if (bytes) this.addBytes(name, bytes);
    else this.files.set(name, { sizeBytes: size, blob });
  }

  addImage(image: ResolvedImage, omit: ReadonlySet<string>): void {
    const { registry, manifests, contents, blobs = [] } = image;
    for (const { digest, bytes } of manifests) this.addBytes(blobPath(digest), bytes);
    for (const descriptor of blobs) this.addBlob({ descriptor, registry });

    for (const { manifest, configBytes } of contents) {
      this.addBlob({ descriptor: manifest.config, registry }, configBytes);
      for (const descriptor of manifest.layers) {
        const isPlanned = this.files.has(blobPath(descriptor.digest));
        if (omit.has(descriptor.digest) && !isPlanned)
          this.omitted.set(descriptor.digest, descriptor);
        else this.addBlob({ descriptor, registry });
      }
    }
  }
}

/**
 * Everything that will be in DEST, known before a byte of a layer: tar, stream and folder are made
 * from it. Two plans with the same `id` put the same bytes at the same offsets. `omit` has the
 * digests of layers that the receiving side holds already; those that are left out for it are
 * `omitted`.
 */
function planTar(
  images: readonly ResolvedImage[],
  omit: ReadonlySet<string> = new Set(),
  extras: PlanExtras = {},
) {
  const planned = new PlannedFiles();
  const manifests = [...images.map(indexEntry), ...(extras.indexEntries ?? [])];
  const listed = images.map(dockerEntry).filter((entry) => entry !== undefined);
  planned.addBytes("oci-layout", encodeJson({ imageLayoutVersion: "1.0.0" }));
  planned.addBytes("index.json", encodeJson({ schemaVersion: 2, mediaType: OCI_INDEX, manifests }));
  planned.addBytes("manifest.json", encodeJson(listed));

  for (const image of images) planned.addImage(image, omit);
  for (const { digest, bytes } of extras.documents ?? []) planned.addBytes(blobPath(digest), bytes);
  for (const blob of extras.blobs ?? []) planned.addBlob(blob);

  return { ...layOut(withFolders(planned.files)), omitted: [...planned.omitted.values()] };
}
type Plan = ReturnType<typeof planTar>;

/** Some readers find an image layout by its folders (anchore/stereoscope#492): they come first. */
function withFolders(files: ReadonlyMap<string, FileContent>): Map<string, FileContent> {
  const algorithms = [...files.keys()].flatMap((name) => /^blobs\/\w+\//.exec(name) ?? []);
  const folders = new Set(["blobs/", "blobs/sha256/", ...algorithms.sort()]);
  const nothing: FileContent = { sizeBytes: 0 };
  return new Map([...[...folders].map((name) => [name, nothing] as const), ...files]);
}

/** Gives each file its place in the tar. */
function layOut(files: ReadonlyMap<string, FileContent>) {
  const entries: PlanEntry[] = [];
  const identity = newHash("sha256:");
  let offset = 0;
  let blobBytes = 0;
  for (const [name, content] of files) {
    const padding = Buffer.alloc(paddingOf(offset));
    const lead = Buffer.concat([padding, encodeTarHeader(name, content.sizeBytes)]);
    offset += lead.length;
    entries.push({ name, lead, offset, ...content });

    identity.update(lead).update(content.bytes ?? "");
    if (content.blob) blobBytes += content.sizeBytes;
    offset += content.sizeBytes;
  }

  const trailer = Buffer.alloc(paddingOf(offset) + 2 * BLOCK);
  const sizeBytes = offset + trailer.length;
  return { entries, trailer, sizeBytes, blobBytes, id: identity.digest("hex") };
}

// ------ Decoding headers ------
// As strict as Go's archive/tar, with which all loaders read: what it refuses, and what it reads
// otherwise than others would, is refused here too.

type TarHeader = Readonly<{
  name: string;
  /** Its name begins with a slash, which some loaders do not take away. */
  isRooted: boolean;
  /** As stored: a sparse file is longer. */
  sizeBytes: number;
  /** "0" a file, "1" a hard link, "2" a symbolic link, "5" a folder, "S" a file with holes. */
  type: string;
  linkName: string;
  holes?: SparseMap | undefined;
  attributes?: AttributeFault | undefined;
}>;
/** Extended attributes that no file can have, or only files and folders. */
type AttributeFault = "for-none" | "for-files";
type TarEntry = TarHeader & Readonly<{ offset: number }>;
/** The pieces that a file with holes has, and its whole length. */
type SparseMap = Readonly<{ realBytes: number; pieces: readonly Span[] }>;
type Span = readonly [from: number, to: number];

const refuseTar = (reason: string): never => fail("BAD_TAR", reason);

function untilNul(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  return bytes.toString("utf8", 0, end < 0 ? bytes.length : end);
}

const LINE_END = 0x0a;
const SPACE = 0x20;
const DIGIT_0 = 0x30;
const DIGIT_7 = 0x37;

/** An octal number between spaces and NULs, or GNU's big-endian one behind a set top bit. */
function readTarNumber(header: Buffer, offset: number, widthBytes: number): number {
  const isBinary = ((header[offset] ?? 0) & 0x80) !== 0;
  if (isBinary) return readBinaryNumber(header.subarray(offset, offset + widthBytes));

  const isBlank = (at: number) => header[at] === SPACE || header[at] === 0;
  let at = offset;
  let end = offset + widthBytes;
  while (at < end && isBlank(at)) at += 1;
  while (at < end && isBlank(end - 1)) end -= 1;

  let value = 0;
  for (; at < end && header[at] !== 0; at += 1) {
    const digit = header[at] ?? 0;
    if (digit < DIGIT_0 || digit > DIGIT_7) refuseTar("a number in a header is not octal");
    value = value * 8 + digit - DIGIT_0;
  }
  return value;
}

/** Negative below a set second bit: times before 1970 are. */
function readBinaryNumber(field: Buffer): number {
  const first = field[0] ?? 0;
  let value = (first & 0x3f) - (first & 0x40);
  for (const byte of field.subarray(1)) value = value * 256 + byte;
  if (Math.abs(value) >= 2 ** 63) refuseTar("a number in a header is too large");
  return value;
}

/**
 * The only pax records that are of use here; the rest is checked and dropped, however much of it
 * there is.
 */
const PAX_KEYS = [
  "path",
  "linkpath",
  "size",
  "GNU.sparse.major",
  "GNU.sparse.minor",
  "GNU.sparse.name",
  "GNU.sparse.realsize",
  "GNU.sparse.size",
  "GNU.sparse.numblocks",
  "GNU.sparse.map",
  "GNU.sparse.offset",
  "GNU.sparse.numbytes",
];
/** What is wrong with the extended attributes stands under the beginning of their keys. */
type PaxRecords = Map<string, string>;

/**
 * The record that begins at a place: its length, which counts itself, a space, KEY=VALUE and a line
 * end.
 */
function paxRecordAt(body: Buffer, at: number): { key: string; value: Buffer; end: number } {
  const refuse = (): never => refuseTar("a pax record is malformed");
  const space = body.indexOf(SPACE, at);
  if (space < 0 || space > at + 10) return refuse();

  const digits = body.toString("latin1", at, space);
  const end = at + Number(digits);
  const equals = body.indexOf("=", space);
  const hasKey = equals > space + 1 && equals < end;
  const isWhole = /^\d+$/.test(digits) && end <= body.length && body[end - 1] === LINE_END;
  if (!hasKey || !isWhole) return refuse();

  const key = body.toString("utf8", space + 1, equals);
  return { key, value: body.subarray(equals + 1, end - 1), end };
}

const PAX_NUMBER = /^[+-]?\d{1,18}$/;
const PAX_TIME = /^[+-]?\d{1,18}(\.\d*)?$/;
const PAX_NUMBERS: Readonly<Record<string, RegExp>> = {
  uid: PAX_NUMBER,
  gid: PAX_NUMBER,
  mtime: PAX_TIME,
  atime: PAX_TIME,
  ctime: PAX_TIME,
};

/** What is of no use here may stop others all the same. */
function isPaxRecord(key: string, value: Buffer): boolean {
  const isText = PAX_KEYS.includes(key) || key === "uname" || key === "gname";
  if (isText ? value.includes(0) : key.includes("\0")) return false;
  const form = Object.hasOwn(PAX_NUMBERS, key) ? PAX_NUMBERS[key] : undefined;
  return !form || value.length === 0 || form.test(value.toString("latin1"));
}

const XATTR_KEY = "SCHILY.xattr.";

/** What is wrong with one of a file's extended attributes, by the kernel's rules. */
function faultOfAttribute(name: string, value: Buffer): AttributeFault | undefined {
  const isLong = Buffer.byteLength(name) > LIMITS.unpackedNameBytes;
  if (isLong || name === "" || /^(user|trusted|security)\.$/.test(name)) return "for-none";
  const version = { 20: 2, 24: 3 }[value.length]; // of capabilities, by their length
  const isCapability =
    name !== "security.capability" || (version !== undefined && value[3] === version);
  const isAcl = !name.startsWith("system.posix_acl_") || (value.length % 8 === 4 && value[0] === 2);
  if (!isCapability || !isAcl) return "for-none";
  return name.startsWith("user.") ? "for-files" : undefined;
}

function parsePaxRecords(body: Buffer, onRecord: () => void): PaxRecords {
  const records: PaxRecords = new Map();
  const sparsePieces: string[] = [];
  const faults = new Set<string | undefined>();
  let attributeBytes = 0;

  for (let at = 0; at < body.length; ) {
    const { key, value, end } = paxRecordAt(body, at);
    at = end;
    onRecord();
    if (!isPaxRecord(key, value)) refuseTar("a pax record is malformed");
    if (key.startsWith(XATTR_KEY)) {
      attributeBytes += key.length + value.length;
      faults.add(faultOfAttribute(key.slice(XATTR_KEY.length), value));
    }
    if (!PAX_KEYS.includes(key)) continue;

    // The oldest form says each piece of a sparse file in two records.
    const piece = ["GNU.sparse.offset", "GNU.sparse.numbytes"].indexOf(key);
    if (piece < 0) records.set(key, value.toString("utf8"));
    else if (piece === sparsePieces.length % 2) sparsePieces.push(value.toString("utf8"));
    else refuseTar("the map of a sparse file is wrong");
  }

  if (sparsePieces.length > 0) records.set("GNU.sparse.map", sparsePieces.join(","));
  if (attributeBytes > LIMITS.attributeBytes) faults.add("for-none");
  const fault = ["for-none", "for-files"].find((each) => faults.has(each));
  if (fault) records.set(XATTR_KEY, fault);
  return records;
}

/** Offsets and lengths by turns, in order, inside the file, and of all that is stored. */
function sparseMapOf(
  numbers: readonly number[],
  realBytes: number,
  storedBytes: number,
): SparseMap {
  const pieces: Span[] = [];
  let before = 0;
  for (let at = 0; at + 1 < numbers.length; at += 2) {
    const [from = 0, length = 0] = numbers.slice(at, at + 2);
    const isInOrder = Number.isSafeInteger(from + length) && from >= before && length >= 0;
    if (!isInOrder || from + length > realBytes) refuseTar("the map of a sparse file is wrong");
    if (length > 0) pieces.push([from, from + length]);
    before = from + length;
  }
  const isAll = sumOf(pieces, ([from, to]) => to - from) === storedBytes;
  if (numbers.length % 2 > 0 || !isAll) refuseTar("the map of a sparse file is wrong");
  return { realBytes, pieces };
}

type SparseForm = "in-record" | "before-content";

/**
 * Where pax records say what a sparse file is made of: in one of them, or before its content. Go
 * takes other forms for plain files of another name and content than GNU's tar and libarchive do.
 */
function sparseFormOf(records: PaxRecords): SparseForm | undefined {
  const keys = [...records.keys()].filter((key) => key.startsWith("GNU.sparse."));
  if (keys.length === 0) return undefined;
  const [major = "", minor = ""] = ["major", "minor"].map((each) =>
    records.get(`GNU.sparse.${each}`),
  );
  const version = `${major}.${minor}`;
  if (version === "1.0") return "before-content";
  const hasMap = version === "." && Boolean(records.get("GNU.sparse.map"));
  if (version === "0.0" || version === "0.1" || hasMap) return "in-record";
  return refuseTar("a sparse file in it is of a form that is not known");
}

function decimalOf(digits: string | undefined): number {
  if (!/^\d+$/.test(digits ?? "")) refuseTar("the map of a sparse file is wrong");
  return Number(digits);
}

/**
 * Reads the headers of one tar: it is given blocks as it wants them, and answers with an entry when
 * one is whole. The entry's content follows, and its padding; what comes after these is the next
 * thing wanted.
 */
class TarDecoder {
  /** How many bytes the next call takes. */
  wantedBytes = BLOCK;
  /** Both of the blocks that end a tar were seen. */
  isAtEnd = false;
  /** The first of them was. */
  hasTrailer = false;
  /** How many global headers there were: some loaders want no two of one name. */
  globalHeaders = 0;
  recordCount = 0;
  #records: PaxRecords = new Map();
  /** GNU's long names, which count more than pax ones. */
  #longNames: PaxRecords = new Map();
  /** What is expected instead of a header. */
  #continuation: ((bytes: Buffer) => TarHeader | undefined) | undefined;

  take(bytes: Buffer): TarHeader | undefined {
    const continuation = this.#continuation;
    this.#continuation = undefined;
    this.wantedBytes = BLOCK;
    return continuation ? continuation(bytes) : this.#takeHeader(bytes);
  }

  #expect(wantedBytes: number, continuation: (bytes: Buffer) => TarHeader | undefined): undefined {
    this.wantedBytes = wantedBytes;
    this.#continuation = continuation;
  }

  #takeHeader(block: Buffer): TarHeader | undefined {
    if (block[0] === 0 && block.every((byte) => byte === 0)) {
      this.isAtEnd = this.hasTrailer;
      this.hasTrailer = true;
      return undefined;
    }
    if (this.hasTrailer) refuseTar("it goes on after the block of zeros that ends it");
    if (statedChecksum(block) !== checksumOf(block))
      refuseTar("it is not a tar, or is damaged (a header's checksum)");

    const numberFields = [100, 108, 116, ...(isUstar(block) ? [329, 337] : [])];
    for (const offset of numberFields) readTarNumber(block, offset, 8);
    for (const offset of [136, ...timesOf(block)]) readTarNumber(block, offset, 12);

    const sizeBytes = readTarNumber(block, 124, 12);
    const type = String.fromCharCode(block[156] || DIGIT_0);
    if ("xgLK".includes(type)) return this.#takeExtension(type, sizeBytes);
    return this.#takeEntry(block, type, sizeBytes);
  }

  #takeExtension(type: string, sizeBytes: number): undefined {
    if (sizeBytes < 0 || sizeBytes > LIMITS.tarExtensionBytes)
      refuseTar("an extended header is too large");

    const use = (body: Buffer): undefined => {
      const content = body.subarray(0, sizeBytes);
      const records = "xg".includes(type) ? this.#readRecords(content) : new Map();
      if (type === "x") this.#records = records;
      // global records are not used, and end what came before
      if (type === "g") this.#forgetExtensions();
      if (type === "g") this.globalHeaders += 1;
      if (type === "L") this.#longNames.set("path", untilNul(content));
      if (type === "K") this.#longNames.set("linkpath", untilNul(content));
    };
    if (sizeBytes === 0) return use(Buffer.alloc(0));
    return this.#expect(sizeBytes + paddingOf(sizeBytes), use);
  }

  #readRecords(content: Buffer): PaxRecords {
    return parsePaxRecords(content, () => {
      this.recordCount += 1;
      if (this.recordCount > LIMITS.paxRecords)
        refuseTar(`its extended headers have more than ${LIMITS.paxRecords} records`);
    });
  }

  #forgetExtensions(): void {
    this.#records = new Map();
    this.#longNames = new Map();
  }

  #takeEntry(block: Buffer, type: string, headerBytes: number): TarHeader | undefined {
    const records = this.#records;
    const longNames = this.#longNames;
    this.#forgetExtensions();
    const sparseForm = type === "S" ? undefined : sparseFormOf(records);
    const name =
      (sparseForm && records.get("GNU.sparse.name")) ||
      longNames.get("path") ||
      records.get("path") ||
      headerName(block);
    const linkName =
      longNames.get("linkpath") || records.get("linkpath") || untilNul(block.subarray(157, 257));

    if (Math.max(name.length, linkName.length) > LIMITS.tarNameBytes)
      refuseTar("a name in it is too long");

    const storedBytes = contentBytes(records, headerBytes);
    const isFolder = type === "5" || (block[156] === 0 && name.endsWith("/"));
    // links, devices and folders, whatever size they state
    const isEmpty = isFolder || "123456".includes(type);
    const attributes = records.get(XATTR_KEY) as AttributeFault | undefined;
    const header: TarHeader = {
      name,
      isRooted: name.startsWith("/"),
      sizeBytes: isEmpty ? 0 : storedBytes,
      type: isFolder ? "5" : type,
      linkName,
      attributes,
    };
    if (type === "S") return this.#takeOldSparse(block, header);
    return sparseForm ? this.#takePaxSparse(sparseForm, records, header) : header;
  }

  #takePaxSparse(form: SparseForm, records: PaxRecords, header: TarHeader): TarHeader | undefined {
    if ("123456".includes(header.type)) refuseTar("a sparse file in it is no file");
    const realBytes = decimalOf(
      records.get("GNU.sparse.size") || records.get("GNU.sparse.realsize"),
    );
    if (form === "before-content") return this.#takeNewSparse(realBytes, header);
    const map = records.get("GNU.sparse.map") || undefined;
    const numbers = map?.split(",").map(decimalOf) ?? [];
    if (numbers.length !== 2 * decimalOf(records.get("GNU.sparse.numblocks")))
      refuseTar("the map of a sparse file is wrong");
    return { ...header, holes: sparseMapOf(numbers, realBytes, header.sizeBytes) };
  }

  /**
   * GNU's own: four pieces in the header, and blocks of 21 more as long as each says that another
   * follows.
   */
  #takeOldSparse(block: Buffer, header: TarHeader): TarHeader | undefined {
    if (!isGnu(block)) refuseTar("the map of a sparse file is wrong");
    const numbers: number[] = [];
    const realBytes = readTarNumber(block, 483, 12);
    const takePieces = (from: Buffer, offset: number, count: number): TarHeader | undefined => {
      const end = offset + count * 24;
      for (let at = offset; at < end && from[at] !== 0; at += 24)
        numbers.push(readTarNumber(from, at, 12), readTarNumber(from, at + 12, 12));

      const isContinued = (from[end] ?? 0) !== 0;
      if (!isContinued)
        return { ...header, holes: sparseMapOf(numbers, realBytes, header.sizeBytes) };
      if (numbers.length * 12 > LIMITS.tarExtensionBytes)
        refuseTar("the map of a sparse file is too large");
      return this.#expect(BLOCK, (more) => takePieces(more, 0, 21));
    };
    return takePieces(block, 386, 4);
  }

  /**
   * The newest form: the map stands before the content, as lines of decimal digits that fill whole
   * blocks.
   */
  #takeNewSparse(realBytes: number, header: TarHeader): TarHeader | undefined {
    let text = "";
    let lineCount = 0;
    let wantedLines = 1; // the first says how many pairs follow
    const takeLines = (block: Buffer): TarHeader | undefined => {
      text += block.toString("latin1");
      lineCount += block.filter((byte) => byte === LINE_END).length;
      if (text.length > LIMITS.tarExtensionBytes)
        refuseTar("the map of a sparse file is too large");
      if (lineCount > 0 && wantedLines === 1)
        wantedLines += 2 * decimalOf(text.slice(0, text.indexOf("\n")));
      if (lineCount < wantedLines) return this.#expect(BLOCK, takeLines);

      const numbers = text.split("\n").slice(1, wantedLines).map(decimalOf);
      const sizeBytes = header.sizeBytes - text.length;
      return { ...header, sizeBytes, holes: sparseMapOf(numbers, realBytes, sizeBytes) };
    };
    return this.#expect(BLOCK, takeLines);
  }
}

/** Undefined where there is no number: what is no tar at all is called that. */
function statedChecksum(block: Buffer): number | undefined {
  const text = block.toString("latin1", CHECKSUM_AT, CHECKSUM_AT + CHECKSUM_BYTES);
  const [, digits] = /^[ \0]*([0-7]+)(?:\0.*|[ \0]*)$/s.exec(text) ?? [];
  return digits === undefined ? undefined : Number.parseInt(digits, 8);
}

/** The size that an entry states; a pax record counts more than the header. */
function contentBytes(records: PaxRecords, headerBytes: number): number {
  const text = records.get("size") || String(headerBytes);
  const sizeBytes = /^\d+$/.test(text) ? Number(text) : -1;
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0)
    refuseTar("an entry's size is not a number");
  return sizeBytes;
}

const isUstar = (block: Buffer): boolean => block.toString("latin1", 257, 262) === "ustar";
const isGnu = (block: Buffer): boolean => block.toString("latin1", 257, 265) === "ustar  \0";
const isStar = (block: Buffer): boolean =>
  block.toString("latin1", 257, 263) === "ustar\0" &&
  block.toString("latin1", 508, 512) === "tar\0";

/**
 * Where the times of the last access and change stand in a header, if at all. In GNU's, Go takes
 * what is no number there for a part of the name.
 */
function timesOf(block: Buffer): number[] {
  if (isGnu(block)) return [345, 357].filter((offset) => block[offset] !== 0);
  return isStar(block) ? [476, 488] : [];
}

/**
 * The name in the header itself. The prefix is POSIX's; in GNU's and star's headers other things
 * stand there.
 */
function headerName(block: Buffer): string {
  const name = untilNul(block.subarray(0, 100));
  const isPosix = block.toString("latin1", 257, 263) === "ustar\0";
  const prefix = isPosix ? untilNul(block.subarray(345, isStar(block) ? 476 : 500)) : "";
  return prefix === "" ? name : `${prefix}/${name}`;
}

// ------ Reading a tar ------

/**
 * Reads up to `length` bytes; fewer only at the end of the file. Pipes and devices have no other
 * place than "here".
 */
async function readAt(
  handle: fs.FileHandle,
  position: number | "here",
  length: number,
): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(length);
  let filled = 0;
  while (filled < length) {
    const from = position === "here" ? null : position + filled;
    const { bytesRead } = await handle.read(buffer, filled, length - filled, from);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}

/** What lies at a place of a file, piece by piece. */
async function* readPlace(handle: fs.FileHandle, from: number, to: number): AsyncGenerator<Buffer> {
  for (let at = from; at < to; at += TUNING.batchBytes) {
    const length = Math.min(TUNING.batchBytes, to - at);
    const piece = await readAt(handle, at, length);
    if (piece.length < length) fail("DISK", "a file became shorter while it was read");
    yield piece;
  }
}

/** Written out, since what is spread takes several times as much: there may be 200,000. */
const entryAt = (header: TarHeader, offset: number): TarEntry => ({
  name: resolveName(header.name),
  isRooted: header.isRooted,
  sizeBytes: header.sizeBytes,
  type: header.type,
  linkName: header.linkName,
  holes: header.holes,
  attributes: header.attributes,
  offset,
});

const cutWithin = (what: string, position: number): string =>
  `it ends at byte ${position}, in the middle of ${what}: it was cut off`;

/** Gives a decoder what stands at a place; what is wrong with it is said with the place. */
function takeAt(decoder: TarDecoder, bytes: Buffer, position: number): TarHeader | undefined {
  try {
    return decoder.take(bytes);
  } catch (error) {
    const isRefusal = error instanceof ImgpullError && error.code === "BAD_TAR";
    throw isRefusal ? new ImgpullError("BAD_TAR", `${error.message}, at byte ${position}`) : error;
  }
}

/**
 * The entries of a tar on disk, that anyone made; their content is passed over. The decoder knows
 * how it ended.
 */
async function* readTar(
  handle: fs.FileHandle,
  where: string,
  decoder = new TarDecoder(),
): AsyncGenerator<TarEntry> {
  const { size } = await handle.stat();
  let ahead: Buffer = Buffer.alloc(0);
  let aheadAt = 0;
  const read = async (position: number, length: number): Promise<Buffer> => {
    if (position < aheadAt || position + length > aheadAt + ahead.length) {
      ahead = await readAt(handle, position, Math.max(length, TUNING.headerReadBytes));
      aheadAt = position;
    }
    return ahead.subarray(position - aheadAt, position - aheadAt + length);
  };

  try {
    for (let position = 0; position < size && !decoder.isAtEnd; ) {
      const wantedBytes = decoder.wantedBytes;
      const bytes = await read(position, wantedBytes);
      if (bytes.length < wantedBytes) refuseTar(cutWithin("a header", size));
      const header = takeAt(decoder, bytes, position);
      position += wantedBytes;
      if (!header) continue;
      if (position + header.sizeBytes > size) refuseTar(cutWithin(resolveName(header.name), size));
      yield entryAt(header, position);
      position += header.sizeBytes + paddingOf(header.sizeBytes);
    }
  } catch (error) {
    const isRefusal = error instanceof ImgpullError && error.code === "BAD_TAR";
    throw isRefusal ? new ImgpullError("BAD_TAR", `${where}: ${error.message}`) : error;
  }
}

/**
 * A name as loaders resolve it: without `.`, `//`, and a slash before or after. Steps up (`..`) are
 * left in.
 */
const resolveName = (name: string): string =>
  name
    .split("/")
    .filter((part) => part !== "" && part !== ".")
    .join("/");

/**
 * The entries of one tar by their names. Loaders differ in which of two they take, and in what they
 * make of a step up or of a name below a link: such names are no names here.
 */
class TarNames {
  readonly entries = new Map<string, TarEntry>();
  readonly #folders = new Set<string>();
  #nameBytes = 0;

  /** Adds an entry, or says what is wrong with its name. */
  add(entry: TarEntry): TarProblem | undefined {
    const { name, type } = entry;
    const isFolder = type === "5";
    if (name.split("/").includes("..")) return { kind: "step-up", entry: name };
    if (!isFolder && (this.entries.has(name) || this.#folders.has(name)))
      return { kind: "name-twice", entry: name };
    if (isFolder && (this.entries.get(name)?.type ?? "5") !== "5")
      return { kind: "name-twice", entry: name };
    this.#nameBytes += name.length + entry.linkName.length;
    const isFull = this.entries.size >= LIMITS.tarEntries || this.#nameBytes > LIMITS.tarNamesBytes;
    if (isFull) return { kind: "too-many-entries" };

    for (let folder = parentOf(name); folder !== ""; folder = parentOf(folder)) {
      if (this.#folders.has(folder)) break;
      if (this.#folders.size >= LIMITS.tarFolders) return { kind: "too-many-entries" };
      if (this.entries.has(folder) && this.entries.get(folder)?.type !== "5")
        return { kind: "below-no-folder", entry: name };
      this.#folders.add(folder);
    }
    this.entries.set(name, entry);
    return undefined;
  }

  /** The file behind a name: docker save makes a link of a layer that occurs twice. */
  file(rawName: string): TarEntry | undefined {
    const name = resolveName(rawName);
    const { type = "", linkName = "" } = this.entries.get(name) ?? {};
    if (type === "2" && linkName.startsWith("/")) return undefined;
    const isLink = type === "1" || type === "2";
    const folder = type === "2" ? path.posix.dirname(name) : "";
    const target = isLink ? resolveName(path.posix.join(folder, linkName)) : name;
    const entry = this.entries.get(target);
    return entry && "0S".includes(entry.type) ? entry : undefined;
  }
}

const parentOf = (name: string): string => name.slice(0, Math.max(0, name.lastIndexOf("/")));

/**
 * Our tars, OCI archives and new docker ones have blobs/sha256/HEX, crane HEX.tar.gz, skopeo
 * HEX.tar and HEX.json.
 */
function digestInName(name: string): string | undefined {
  const form =
    /^(?:blobs\/(sha\d+\/[0-9a-f]+)|(?:sha256:)?([0-9a-f]{64})(?:\.json|\.tar|\.tar\.gz)?)$/;
  const [, blob, bare] = form.exec(name) ?? [];
  const digest = blob?.replace("/", ":") ?? `sha256:${bare}`;
  return isDigest(digest) ? digest : undefined;
}

const PACKING_MAGIC: [packing: Packing, hex: RegExp][] = [
  ["gzip", /^1f8b/],
  ["zstd", /^(28b52ffd|5.2a4d18)/],
  ["xz", /^fd377a585a00/],
  ["bzip2", /^425a68/],
];
type Packing = "gzip" | "zstd" | "xz" | "bzip2";

/** As it begins; other frames of zstd are skipped. */
const ZSTD_FRAME = 0x28;

/** How bytes are compressed, by how they begin. */
function packingOf(bytes: Buffer): Packing | undefined {
  const hex = bytes.toString("hex", 0, 6);
  return PACKING_MAGIC.find(([, magic]) => magic.test(hex))?.[0];
}

/** A tar at hand. What its names claim of digests is believed only after hashing. */
async function openTarFile(file: string) {
  // A pipe is not waited for, but refused.
  const handle = await onDisk(`cannot read ${file}`, fs.open(file, O_RDONLY | O_NONBLOCK));
  const names = new TarNames();
  const blobs = new Map<string, TarEntry>();
  try {
    if (!(await handle.stat()).isFile()) fail("BAD_TAR", `${file}: it is not a file`);
    const packing = packingOf(await readAt(handle, 0, BLOCK));
    if (packing)
      fail("BAD_TAR", `${file}: it is not a tar, but compressed (${packing}): unpack it first`);

    for await (const entry of readTar(handle, file)) {
      const problem = names.add(entry);
      if (problem) fail("BAD_TAR", `${file}: ${problemWords(problem)}`);
      const digest = digestInName(entry.name);
      if (digest !== undefined && entry.type === "0" && !entry.holes) blobs.set(digest, entry);
    }
    return { handle, names, blobs };
  } catch (error) {
    await handle.close();
    throw error;
  }
}
type OpenTar = Awaited<ReturnType<typeof openTarFile>>;
type Tars = readonly OpenTar[];

/** Where bytes begin in a file at hand. */
type Place = Readonly<{ handle: fs.FileHandle; offset: number }>;
type Sized = Pick<Descriptor, "digest" | "size">;

/** Whether bytes at hand have a digest. */
async function isIntact(
  { handle, offset }: Place,
  { digest, size }: Sized,
  signal?: AbortSignal,
): Promise<boolean> {
  const hash = newHash(digest);
  for await (const piece of readPlace(handle, offset, offset + size)) {
    signal?.throwIfAborted();
    hash.update(piece);
  }
  return hash.digest("hex") === hexOf(digest);
}

/**
 * The layers of each image that a manifest.json lists, from the bottom; empty words for names
 * without a digest.
 */
function chainsOf(list: unknown): string[][] {
  const images = Array.isArray(list) ? list.map(parseDockerEntry) : [];
  return images.map((image) => (image?.layers ?? []).map((layer) => digestInName(layer) ?? ""));
}

/** The same for a tar at hand: what `docker load` takes from it. */
async function dockerChains({ handle, names }: OpenTar): Promise<string[][]> {
  const entry = names.file("manifest.json");
  if (!entry || entry.holes || entry.sizeBytes > LIMITS.tarMetadataBytes) return [];
  return chainsOf(parseJson(await readAt(handle, entry.offset, entry.sizeBytes)));
}

/**
 * The layers that a receiver who has loaded `chains` need not be sent. docker's classic store knows
 * a layer by all those below it (moby/moby#18723): so only what stands at the bottom of an image,
 * in the same order, is there.
 */
function layersToOmit(
  images: readonly ResolvedImage[],
  chains: readonly (readonly string[])[],
): Set<string> {
  const omitted = new Set<string>();
  const needed = new Set<string>();
  for (const content of images.flatMap(({ contents }) => contents)) {
    const layers = content.manifest.layers.map(({ digest }) => digest);
    const sharedCounts = chains.map((chain) => {
      const end = layers.findIndex((digest, at) => digest !== chain[at]);
      return end < 0 ? layers.length : end;
    });
    const sharedCount = isImageContent(content) ? Math.max(0, ...sharedCounts) : 0;
    for (const digest of layers.slice(0, sharedCount)) omitted.add(digest);
    for (const digest of layers.slice(sharedCount)) needed.add(digest);
  }
  return new Set([...omitted].filter((digest) => !needed.has(digest)));
}

/** The sentence for what is wrong with a tar. */
function problemWords(problem: TarProblem): string {
  const entry = "entry" in problem ? printable(problem.entry) : "";
  switch (problem.kind) {
    case "unreadable":
      return problem.reason;
    case "cut-off":
      return `its end is missing: it was cut off at byte ${problem.atByte}`;
    case "too-many-entries":
      return `it has more than ${LIMITS.tarEntries} entries, or too long names`;
    case "too-many-references":
      return `its images name more than ${LIMITS.tarReferences} manifests and layers`;
    case "name-twice":
      return `two entries are called ${entry}`;
    case "step-up":
      return `the name ${entry} leads through ..`;
    case "below-no-folder":
      return `${entry} lies below something that is no folder`;
    case "damaged":
      return `${entry} is damaged`;
    case "missing":
      return `${entry} is missing (a tar made with \`since\` needs its base)`;
    case "size":
      return `${entry} has ${problem.actualBytes} bytes, not ${problem.expectedBytes}`;
    case "document":
      return `${entry} ${problem.reason}`;
    case "malformed":
      return `${entry}: ${problem.reason}`;
    case "nothing-here":
      return `${entry} names nothing that is here`;
    case "diff-ids":
      return `${entry} has not one diff_id for each layer`;
    case "diff-id":
      return `${entry} does not unpack to ${problem.diffId}, its diff_id`;
    case "unpacks-without-end":
      return `${entry} unpacks to more than ${LIMITS.unpackFactor} times its size`;
    case "no-image":
      return "it holds no image: neither index.json nor manifest.json names one";
  }
}

// ====== 12. Pull ======
// Plan → bytes in place → verify → rename. Blobs come side by side, each hashed in order as it
// comes; a connection without work takes over half of the longest range that is under way.
// Invariant: nothing has DEST's name before every byte of it was hashed and compared.

// ------ Ranges ------
// Lists of ranges are sorted, and their members neither overlap nor touch. `to` is the first byte
// after a range.
type Range = readonly [from: number, to: number];
type Ranges = readonly Range[];

const lengthOf = (ranges: Ranges): number => sumOf(ranges, ([from, to]) => to - from);

function addRange(ranges: Ranges, [from, to]: Range): Ranges {
  const before: Range[] = [];
  const behind: Range[] = [];
  let start = from;
  let end = to;
  for (const range of ranges) {
    if (range[1] < from) {
      before.push(range);
    } else if (range[0] > to) {
      behind.push(range);
    } else {
      start = Math.min(start, range[0]);
      end = Math.max(end, range[1]);
    }
  }
  return [...before, [start, end], ...behind];
}

/** What of a range is in none of them. */
function missingRanges(ranges: Ranges, [from, to]: Range): Ranges {
  const missing: Range[] = [];
  let at = from;
  for (const [start, end] of ranges) {
    if (start >= to) break;
    if (start > at) missing.push([at, start]);
    at = Math.max(at, end);
  }
  if (at < to) missing.push([at, to]);
  return missing;
}

// ------ The state of a blob ------
// Fetched → in place → recorded, and hashed in order beside that. Nothing but the methods below
// changes any of it.

/**
 * What a blob is at first, and again once its bytes were wrong. `hash` has taken in the bytes below
 * `hashedTo`.
 */
const nothingOf = (digest: string) => ({
  hash: newHash(digest),
  hashedTo: 0,
  config: [] as Buffer[], // what is hashed, of an image's config
  come: [] as Ranges,
  inPlace: [] as Ranges,
  unrecordedBytes: 0,
  resumedBytes: 0, // from an earlier run
  reusedBytes: 0, // from a tar at hand, or from DEST
});

/**
 * Memory for bytes that came before their turn to be hashed; a piece has its cost, however small.
 */
class EarlyRoom {
  #leftBytes: number = TUNING.earlyBytes;

  take(sizeBytes: number): boolean {
    const cost = Math.max(TUNING.earlyPieceBytes, sizeBytes);
    if (cost > this.#leftBytes) return false;
    this.#leftBytes -= cost;
    return true;
  }
  giveBack(sizeBytes: number): void {
    this.#leftBytes += Math.max(TUNING.earlyPieceBytes, sizeBytes);
  }
}

/**
 * One blob: what has come of it, what is in place, recorded and hashed, and how often it may be
 * fetched anew.
 */
class BlobState {
  readonly descriptor: Descriptor;
  readonly registry: Registry;
  /** Where its place begins: in the tar, or 0 in a file of its own. */
  readonly offset: number;

  /**
   * Tars at hand that claim to hold it: the first is read in the registry's stead, and dropped if
   * it lied.
   */
  readonly #sources: Place[];
  #restartsLeft = 1; // fetches from the start, after the registry's bytes turned out wrong
  #isDone = false;
  #recordedAtMs = 0;
  #state: ReturnType<typeof nothingOf>;
  readonly #early = new Map<number, Buffer>(); // by position

  constructor(descriptor: Descriptor, registry: Registry, offset = 0, tars: Tars = []) {
    this.descriptor = descriptor;
    this.registry = registry;
    this.offset = offset;
    this.#state = nothingOf(descriptor.digest);
    this.#sources = tars.flatMap(({ handle, blobs }) => {
      const entry = blobs.get(descriptor.digest);
      return entry?.sizeBytes === descriptor.size ? [{ handle, offset: entry.offset }] : [];
    });
  }

  get source(): Place | undefined {
    return this.#sources[0];
  }
  /** Bytes that have come, whether they are in place yet or not. */
  get doneBytes(): number {
    return lengthOf(this.#state.come);
  }
  get isDone(): boolean {
    return this.#isDone;
  }
  get hashedTo(): number {
    return this.#state.hashedTo;
  }
  get inPlace(): Ranges {
    return this.#state.inPlace;
  }
  get unrecordedBytes(): number {
    return this.#state.unrecordedBytes;
  }
  get resumedBytes(): number {
    return this.#state.resumedBytes;
  }
  get reusedBytes(): number {
    return this.#state.reusedBytes;
  }

  /** What of a range, or of all, has not come yet. */
  missing(range: Range = [0, this.descriptor.size]): Ranges {
    return missingRanges(this.#state.come, range);
  }

  /**
   * What an earlier run put in place is gone on with. Where the disk lost it, that is not the
   * registry's fault.
   */
  resume(ranges: Ranges): void {
    this.#state.come = ranges;
    this.#state.inPlace = ranges;
    this.#state.resumedBytes = lengthOf(ranges);
    if (ranges.length === 0) return;
    this.#sources.length = 0;
    this.#restartsLeft += 1;
  }

  /** Bytes came: gives back those that had not come before, each piece with its position. */
  accept(position: number, bytes: Buffer, room?: EarlyRoom): [position: number, bytes: Buffer][] {
    const isNew = this.missing([position, position + bytes.length]);
    return isNew.map(([from, to]) => {
      const piece = bytes.subarray(from - position, to - position);
      if (from > this.#state.hashedTo && room?.take(piece.length)) this.#early.set(from, piece);
      else this.hashInOrder(from, piece, room);
      this.#state.come = addRange(this.#state.come, [from, to]);
      if (this.source) this.#state.reusedBytes += piece.length;
      return [from, piece];
    });
  }

  /** Takes bytes into the hash where their turn has come, and what waits in memory behind them. */
  hashInOrder(position: number, bytes: Buffer, room?: EarlyRoom): void {
    const known = this.#state.hashedTo - position;
    if (known < 0 || known >= bytes.length) return;
    this.#hashNext(bytes.subarray(known));

    // A loop, since a server decides how small the pieces are.
    for (let next = this.#takeEarly(room); next; next = this.#takeEarly(room)) this.#hashNext(next);
  }

  #hashNext(bytes: Buffer): void {
    this.#state.hash.update(bytes);
    this.#state.hashedTo += bytes.length;
    if (CONFIG_TYPES.includes(this.descriptor.mediaType)) this.#state.config.push(bytes);
  }

  #takeEarly(room: EarlyRoom | undefined): Buffer | undefined {
    const { hashedTo } = this.#state;
    const bytes = this.#early.get(hashedTo);
    this.#early.delete(hashedTo);
    if (bytes) room?.giveBack(bytes.length);
    return bytes;
  }

  /** What is in place, and neither hashed nor in memory, where the hash goes on. */
  toReadBack(): Range | undefined {
    const { hashedTo, inPlace } = this.#state;
    const [from, to] = inPlace.find(([, end]) => end > hashedTo) ?? [NEVER, NEVER];
    if (from > hashedTo) return undefined;
    let end = to;
    for (const early of this.#early.keys()) if (early > hashedTo) end = Math.min(end, early);
    return [hashedTo, end];
  }

  markWritten(position: number, sizeBytes: number): void {
    this.#state.inPlace = addRange(this.#state.inPlace, [position, position + sizeBytes]);
    this.#state.unrecordedBytes += sizeBytes;
  }

  /**
   * Whether so much has been written since it was last recorded, or so long ago, that it should be
   * again.
   */
  isRecordDue(nowMs: number): boolean {
    const { unrecordedBytes } = this.#state;
    const isOld = nowMs - this.#recordedAtMs >= TUNING.batchMs / 2;
    return unrecordedBytes >= TUNING.journalBytes || (unrecordedBytes > 0 && isOld);
  }

  markRecorded(nowMs: number): void {
    this.#state.unrecordedBytes = 0;
    this.#recordedAtMs = nowMs;
  }

  /** Whether all of it was hashed, and came to its digest. The hash can be asked once. */
  verify(): boolean {
    const { hash, hashedTo } = this.#state;
    const { digest, size } = this.descriptor;
    const isRight = hashedTo === size && hash.digest("hex") === hexOf(digest);
    if (isRight) this.#checkConfig();
    return isRight;
  }

  /**
   * An image's config that is right and makes no sense: nothing would load what is pulled with it.
   */
  #checkConfig(): void {
    const { digest, mediaType } = this.descriptor;
    if (!CONFIG_TYPES.includes(mediaType)) return;
    const config = parseJson(Buffer.concat(this.#state.config));
    if (!isRecord(config)) fail("PROTOCOL", `${digest}: this config is not a JSON object`);
  }

  markDone(): void {
    this.#isDone = true;
  }

  /** All of it was there already, and is right. */
  keep(): void {
    this.#state.come = [[0, this.descriptor.size]];
    this.#state.inPlace = this.#state.come;
    this.#state.reusedBytes = this.descriptor.size;
    this.#isDone = true;
  }

  /**
   * Its bytes were wrong and are forgotten. Says whose they were, and whether it may be fetched
   * once more; that it came from a mirror costs the registry no restart.
   */
  restart(
    isFromMirror: boolean,
    room?: EarlyRoom,
  ): { liar: "source" | "registry"; isLast: boolean } {
    for (const bytes of this.#early.values()) room?.giveBack(bytes.length);
    this.#early.clear();
    this.#state = nothingOf(this.descriptor.digest);
    if (this.#sources.shift()) return { liar: "source", isLast: false };
    if (!isFromMirror) this.#restartsLeft -= 1;
    return { liar: "registry", isLast: this.#restartsLeft < 0 };
  }

  /** The tar at hand does not hold it after all. */
  dropSource(): void {
    this.#sources.shift();
  }
}

const sizeOf = (blobs: readonly BlobState[]): number =>
  sumOf(blobs, ({ descriptor }) => descriptor.size);

const blobsOf = ({ entries }: Plan, tars: Tars, isOwnFile = false): BlobState[] =>
  entries.flatMap(({ blob, offset }) =>
    blob ? [new BlobState(blob.descriptor, blob.registry, isOwnFile ? 0 : offset, tars)] : [],
  );

// ------ How many connections ------
// Decided by what is measured, not by how far away a registry is. Neither this part nor the next
// one knows a network, a clock or a file: test/lines.test.ts drives both over lines of its own.

/** What there is to go by at one moment. */
type Sample = Readonly<{
  nowMs: number;
  /** All that has come so far, and all that is to come. */
  cameBytes: number;
  leftBytes: number;
  /** Connections that are in use, and those of them that bring bytes. */
  open: number;
  flowing: number;
  /** How long an answer takes. */
  waitMs: number;
  /** How long our own processor has been at work so far. */
  busyMs: number;
}>;

/**
 * What so many connections brought in a stretch of time, and the share of it in which we were at
 * work.
 */
type Measured = Readonly<{ connections: number; bytesPerMs: number; busy: number }>;

/** More connections were opened: is the line faster than with those before? */
type Trial = { readonly against: Measured; readonly sinceMs: number; chances: number };

/**
 * Where one connection brings so much, it is likely the processor, the disk or the server that is
 * full: a trial throws megabytes away that are under way, and so it waits for better figures, adds
 * fewer, and has to bring more.
 */
const isFast = ({ connections, bytesPerMs }: Measured): boolean =>
  bytesPerMs / connections > TUNING.fastBytesPerMs;

/** By how much a trial has to be faster. */
const noiseOf = (measured: Measured): number =>
  isFast(measured) ? TUNING.fastNoise : TUNING.noise;

/**
 * How many connections are worth having. A few at first. More are tried as long as that makes the
 * whole faster by more than noise; where it does not, we go back to what there was before, and try
 * again later, or once the line is slower.
 */
class Pace {
  readonly most: number;
  readonly #few: number;
  #wanted: number;
  #maySplit = false;
  #start: Sample | undefined; // of the stretch that is being measured
  #held: Measured | undefined; // what the last trial came to
  #trial: Trial | undefined;
  #wasSlower = false; // in the last stretch
  #sinceMs = 0; // that bytes come
  #nextTrialMs = 0;
  #pauseMs: number = TUNING.trialPauseMs;

  constructor(most: number) {
    this.most = most;
    this.#few = Math.min(most, TUNING.firstConnections);
    this.#wanted = this.#few;
  }

  /** How many connections may be in use. */
  get wanted(): number {
    return this.#wanted;
  }
  /** Whether blobs may be cut into ranges, so that there is work for all of them. */
  get maySplit(): boolean {
    return this.#maySplit;
  }
  /** What one connection brings; 0 while that is unknown. */
  get bytesPerMsEach(): number {
    return this.#held ? this.#held.bytesPerMs / this.#held.connections : 0;
  }

  observe(sample: Sample): void {
    // Between two requests, as with one connection: a trial would begin from none, and stay there.
    if (sample.open === 0) return;
    const start = this.#start;
    if (!start || start.flowing === 0) this.#sinceMs = sample.nowMs;
    if (!start || start.flowing === 0 || this.#isSettling(sample)) {
      this.#start = sample;
      return;
    }
    const elapsedMs = sample.nowMs - start.nowMs;
    if (elapsedMs < (this.#held ? TUNING.measureMs : TUNING.firstMeasureMs)) return;

    this.#start = sample; // the next stretch
    const bytesPerMs = (sample.cameBytes - start.cameBytes) / elapsedMs;
    const busy = (sample.busyMs - start.busyMs) / elapsedMs;
    this.#judge({ connections: sample.open, bytesPerMs, busy }, sample);
  }

  /** New connections have to be made and answered before they can be judged. */
  #isSettling({ open, flowing, waitMs, nowMs }: Sample): boolean {
    const trial = this.#trial;
    if (!trial || trial.chances < TUNING.trialChances) return false;
    const isLongEnough = nowMs - trial.sinceMs > 6 * waitMs + TUNING.measureMs;
    const isUnderWay = open > trial.against.connections && flowing >= 0.75 * open;
    return !isUnderWay && !isLongEnough;
  }

  #judge(measured: Measured, sample: Sample): void {
    if (this.#trial) this.#judgeTrial(measured, sample.nowMs);
    else this.#held ??= measured;

    const held = this.#held as Measured;
    const isSlow = measured.bytesPerMs < 0.6 * held.bytesPerMs;
    const isSlower = isSlow && this.#wasSlower; // one such stretch may be a hiccup
    this.#wasSlower = isSlow;
    if (isSlower) this.#nextTrialMs = sample.nowMs;
    if (isSlower || measured.bytesPerMs > held.bytesPerMs) this.#held = measured;
    if (!this.#trial && sample.nowMs >= this.#nextTrialMs) this.#try(measured, sample);
  }

  #judgeTrial(measured: Measured, nowMs: number): void {
    const trial = this.#trial as Trial;
    const isFaster = measured.bytesPerMs > trial.against.bytesPerMs * (1 + noiseOf(trial.against));
    trial.chances -= 1;
    if (!isFaster && trial.chances > 0) return;

    this.#trial = undefined;
    this.#held = measured;
    if (isFaster) return;
    // Whole blobs side by side cost no request more: a few of them may always be under way.
    this.#wanted = Math.max(trial.against.connections, this.#few);
    this.#maySplit = false;
    this.#nextTrialMs = nowMs + this.#pauseMs;
    this.#pauseMs *= 4;
  }

  #try({ busy }: Measured, { nowMs, open, leftBytes }: Sample): void {
    if (this.#maySplit && this.#wanted >= this.most) return; // all is tried already
    if (open >= this.most) return;
    const against = { ...(this.#held as Measured), connections: open };
    if (busy * (1 + noiseOf(against)) > TUNING.busyLoop) return; // our own processor is the limit
    const leftMs = leftBytes / against.bytesPerMs;
    if (leftMs < (isFast(against) ? TUNING.fastWorthMs : TUNING.worthTryingMs)) return;
    const isEarly = nowMs - this.#sinceMs < TUNING.fastMeasureMs;
    if (isFast(against) && isEarly) return;

    const more = Math.max(this.#few, Math.ceil(open * TUNING.growth));
    this.#wanted = Math.min(this.most, isFast(against) ? 2 * open : more);
    this.#maySplit = true;
    this.#trial = { against, sinceMs: nowMs, chances: TUNING.trialChances };
  }
}

// ------ Scheduling ------
// Which connection fetches what. A blob begins with one plain GET of the whole. Where more
// connections help, others take units out of what lies ahead of it, in order, so that the hash
// keeps up; at the end, half of what another has left.

/**
 * A range that one connection fetches: `at` is the next byte. Its end moves when another takes
 * over, or gives back.
 */
class Segment {
  readonly blob: BlobState;
  at: number;
  to: number;
  /** Waiting: between two requests. Left: its connection was given to another range. */
  state: "waiting" | "asked" | "flowing" | "left" = "waiting";
  askedAtMs = 0;

  constructor(blob: BlobState, [at, to]: Range) {
    this.blob = blob;
    this.at = at;
    this.to = to;
  }
  get remainingBytes(): number {
    return this.to - this.at;
  }
  get isComplete(): boolean {
    return this.at >= this.to;
  }
  get isFlowing(): boolean {
    return this.state === "flowing";
  }
  /** Where it begins in the tar. */
  get place(): number {
    return this.blob.offset + this.at;
  }
}

const longestFirst = (left: Segment, right: Segment): number =>
  right.remainingBytes - left.remainingBytes;

const inOrder = (left: Segment, right: Segment): number => left.place - right.place;

/** Whether an answer that took so long had to be fetched first, by what another one took. */
const isLateBeside = (waitMs: number, otherMs: number): boolean =>
  waitMs > 3 * otherMs + TUNING.promptMs;

/**
 * How a registry, or what stands between it and us, takes to ranges. A cache that has to fetch a
 * blob first may fetch the whole of it for each range, or keep nothing of what it was asked for in
 * ranges. So where a blob's first bytes were long in coming, something small is asked for once
 * more: if that comes much sooner, somebody keeps what he was asked for, the blob was not there
 * yet, and is heard to its end by one answer. Where there is nothing small, or that leaves a doubt,
 * one range is tried near what is under way, before there are many: a cache that fetches up to it
 * answers late.
 */
class RangeManners {
  isWelcome = true;
  #look: "not taken" | "under way" | "impossible" | { waitMs: number } = "not taken";
  #quickestMs = NEVER;
  #hasGivenOne = false;
  #wasLate = false;

  answered(waitMs: number): void {
    this.#quickestMs = Math.min(this.#quickestMs, waitMs);
  }
  /** A range was tried beside what is under way of its blob. Late once may be the line's doing. */
  tried(waitMs: number, firstWaitMs: number): void {
    if (!isLateBeside(waitMs, firstWaitMs)) this.#hasGivenOne = true;
    else if (this.#wasLate) this.isWelcome = false;
    else this.#wasLate = true;
  }
  lookedAgain(look: "under way" | "impossible" | { waitMs: number }): void {
    this.#look = look;
  }

  /** How soon an answer can come. */
  get waitMs(): number {
    return Number.isFinite(this.#quickestMs) ? this.#quickestMs : 0;
  }

  /** Whether a blob's first answer came so late that it takes a second look to say why. */
  wantsLook(firstWaitMs: number): boolean {
    if (firstWaitMs === NEVER) return false; // the cache has said so itself, or nothing came yet
    return firstWaitMs > TUNING.promptMs && this.#look === "not taken";
  }

  /** Ranges of a blob that may wait for their answers at once, beside what is under way of it. */
  mostUnanswered(firstWaitMs: number): number {
    if (!this.isWelcome || firstWaitMs === NEVER) return 0;
    if (firstWaitMs <= TUNING.promptMs) return NEVER;
    if (this.#look === "not taken" || this.#look === "under way") return 0;
    if (this.#look !== "impossible") {
      if (isLateBeside(firstWaitMs, this.#look.waitMs)) return 0;
      if (firstWaitMs <= 3 * this.#look.waitMs) return NEVER;
    }
    return this.#hasGivenOne ? NEVER : 1;
  }
}

/** How an answer came: its first bytes, after its request had a connection. */
type LineAnswer = Readonly<{
  waitMs: number;
  isRange: boolean;
  isMiss: boolean;
  /** From a storage to which the registry sends us. */
  isElsewhere: boolean;
}>;

type ScheduleOptions = Readonly<{
  /** The most connections. */
  most: number;
  /** Where bytes are wanted in order: how far into the tar one may begin now. */
  horizon?: () => number;
}>;

/**
 * Owns what is queued, what is under way, and what was seen of registries on the way; its segments
 * change here only.
 */
class Schedule {
  readonly #pace: Pace;
  readonly #horizon: (() => number) | undefined;
  readonly #queued: Segment[] = []; // what nobody fetches yet
  readonly #active = new Set<Segment>();
  readonly #parts = new Map<BlobState, Set<Segment>>(); // the same by blob, queued and active
  readonly #origins = new Set<string>(); // of all that was queued
  readonly #manners = new Map<Registry, RangeManners>();
  readonly #waits = new Map<BlobState, number>(); // how long a blob's first answer took
  readonly #units = new Map<BlobState, number>(); // of blobs that are cut
  readonly #limits = new Map<string, ConnectionLimit>(); // by origin
  readonly #abandoned: Segment[] = []; // left to another while they were asked for
  #nowMs = 0;
  #addedBytes = 0; // to what had to come
  #cameBytes = 0;

  constructor({ most, horizon }: ScheduleOptions) {
    this.#pace = new Pace(most);
    this.#horizon = horizon;
  }

  get isOver(): boolean {
    return this.#queued.length + this.#active.size === 0;
  }
  /** The blobs that are under way. */
  get activeBlobs(): Set<BlobState> {
    return new Set([...this.#active].map(({ blob }) => blob));
  }
  get connections(): number {
    return this.#active.size;
  }
  /** All bytes that have come. */
  get cameBytes(): number {
    return this.#cameBytes;
  }

  /** Queues what a blob lacks; nothing but its check, where that is nothing. */
  add(blobs: readonly BlobState[]): void {
    for (const blob of blobs) {
      this.#units.delete(blob);
      this.#origins.add(blob.registry.origin);
      const missing = blob.missing();
      this.#addedBytes += lengthOf(missing);
      for (const range of missing.length > 0 ? missing : [[0, 0] as const])
        this.#queued.push(this.#make(blob, range));
    }
    this.#queued.sort(this.#horizon ? inOrder : longestFirst);
  }

  #make(blob: BlobState, range: Range): Segment {
    const segment = new Segment(blob, range);
    this.#parts.set(blob, this.#partsOf(blob).add(segment));
    return segment;
  }

  #partsOf(blob: BlobState): Set<Segment> {
    return this.#parts.get(blob) ?? new Set();
  }

  #queuedParts(blob: BlobState): Segment[] {
    return [...this.#partsOf(blob)].filter((segment) => !this.#active.has(segment));
  }

  #dropQueued(segment: Segment): void {
    this.#queued.splice(this.#queued.indexOf(segment), 1);
    this.#forget(segment);
  }

  #forget(segment: Segment): void {
    const parts = this.#partsOf(segment.blob);
    parts.delete(segment);
    if (parts.size === 0) this.#parts.delete(segment.blob);
  }

  /**
   * What one more connection fetches now; undefined where there is none wanted, or nothing for it.
   */
  next(): Segment | undefined {
    if (this.#connectionsInUse() >= this.#pace.wanted) return undefined;
    const segment = this.#horizon ? this.#nextInOrder() : (this.#takeQueued() ?? this.#cut());
    if (!segment) return undefined;

    this.#active.add(segment);
    return segment;
  }

  /** The first of the tar that is near enough, be it queued or a part of what another fetches. */
  #nextInOrder(): Segment | undefined {
    const horizon = this.#horizon?.() ?? NEVER;
    const longest = this.#longest();
    const cutPlace = longest ? longest.place + this.#kept(longest) : NEVER;
    const queued = this.#firstQueued();
    if (Math.min(cutPlace, queued?.place ?? NEVER) >= horizon) return undefined;
    return queued && queued.place < cutPlace ? this.#takeQueued() : this.#cut();
  }

  #takeQueued(): Segment | undefined {
    const queued = this.#firstQueued();
    if (!queued) return undefined;

    const { blob } = queued;
    const unit = this.#knownUnit(blob);
    const isShared = blob.registry.acceptsRanges && this.#mostUnanswered(blob) > 0;
    if (isShared && queued.remainingBytes > 1.5 * unit) {
      const first = this.#make(blob, [queued.at, queued.at + unit]);
      queued.at = first.to;
      return first;
    }
    this.#queued.splice(this.#queued.indexOf(queued), 1);
    if (!blob.registry.acceptsRanges) this.#absorbQueued(queued); // all comes with any part
    return queued;
  }

  /** Of the first blob that may be asked for, the part that the hash needs first. */
  #firstQueued(): Segment | undefined {
    const isAnyOpen = [...this.#origins].some((origin) => this.#hasRoom(origin));
    if (!isAnyOpen) return undefined; // thousands may be queued

    const isAllowed = ({ blob }: Segment) =>
      this.#hasRoom(blob.registry.origin) && this.#mayJoin(blob);
    const allowed = this.#queued.find(isAllowed);
    return allowed && this.#queuedParts(allowed.blob).sort(inOrder)[0];
  }

  /**
   * A part of the longest range under way: the unit behind what its own connection keeps, or all
   * that is left behind it.
   */
  #cut(): Segment | undefined {
    const longest = this.#longest();
    if (!longest) return undefined;
    const { blob, at, to } = longest;
    const unit = this.#unitOf(longest);
    const from = at + this.#kept(longest);
    const end = to - from > 1.5 * unit ? from + unit : to;

    longest.to = from;
    if (end < to) {
      this.#queued.unshift(this.#make(blob, [end, to]));
      this.#queued.sort(this.#horizon ? inOrder : longestFirst);
    }
    return this.#make(blob, [from, end]);
  }

  /**
   * What a connection keeps of its range when that is cut: so much that both are done at the same
   * time, where less is left than for two units.
   */
  #kept(segment: Segment): number {
    const half = Math.ceil((segment.remainingBytes + this.#headStartOf(segment.blob)) / 2);
    return Math.min(this.#unitOf(segment), half);
  }

  /** What a connection brings until another one's first bytes are there. */
  #headStartOf({ registry }: BlobState): number {
    return Math.ceil(this.#pace.bytesPerMsEach * this.#mannersOf(registry).waitMs);
  }

  /** How much of a blob is taken at once: all of it, unless it is cut. */
  #knownUnit(blob: BlobState): number {
    return this.#pace.maySplit ? (this.#units.get(blob) ?? NEVER) : NEVER;
  }

  /** A blob's share for each connection, but not so much that its hash falls far behind. */
  #unitOf({ blob, remainingBytes }: Segment): number {
    const known = this.#units.get(blob);
    if (known !== undefined) return known;
    const share = Math.ceil(remainingBytes / this.#pace.most);
    const most = this.#horizon
      ? Math.ceil(TUNING.streamWindowBytes / this.#pace.most)
      : TUNING.unitBytes;
    const unit = Math.max(this.#headStartOf(blob) + this.#worthBytes(), Math.min(share, most));
    this.#units.set(blob, unit);
    return unit;
  }

  /** The longest range that may be cut, and is worth a request of its own. */
  #longest(): Segment | undefined {
    if (!this.#pace.maySplit) return undefined;
    const candidates = [...this.#active].filter((segment) => this.#isWorthCutting(segment));
    const cuttable = candidates.filter(
      ({ blob }) => this.#maySplit(blob) && this.#hasRoom(blob.registry.origin),
    );
    return cuttable.sort(this.#horizon ? inOrder : longestFirst)[0];
  }

  #isWorthCutting({ isFlowing, remainingBytes, blob }: Segment): boolean {
    return isFlowing && remainingBytes >= this.#headStartOf(blob) + 2 * this.#worthBytes();
  }

  /** What another connection has to bring, and so to save, or it is not worth its request. */
  #worthBytes(): number {
    return Math.ceil(Math.max(TUNING.splitBytes, this.#pace.bytesPerMsEach * TUNING.worthMs));
  }

  /**
   * Whether a part of a blob may be asked for now. What an earlier run left open is asked for one
   * after the other, until it is known how ranges of the blob are taken.
   */
  #mayJoin(blob: BlobState): boolean {
    const isMoving = (other: Segment) => other.blob === blob && !this.#isAhead(other);
    const isUnderWay = [...this.#active].some(isMoving);
    return !isUnderWay || blob.source !== undefined || this.#maySplit(blob);
  }

  #maySplit(blob: BlobState): boolean {
    const { registry, source } = blob;
    if (source || !registry.acceptsRanges) return false;

    const isUnanswered = (other: Segment) =>
      other.blob.registry === registry && other.at > 0 && !other.isFlowing;
    return [...this.#active].filter(isUnanswered).length < this.#mostUnanswered(blob);
  }

  #mostUnanswered(blob: BlobState): number {
    return this.#mannersOf(blob.registry).mostUnanswered(this.#firstWaitMs(blob));
  }

  /** NEVER: nothing came of it yet, or a cache says that it had to fetch it. */
  #firstWaitMs(blob: BlobState): number {
    return this.#waits.get(blob) ?? NEVER;
  }

  #mannersOf(registry: Registry): RangeManners {
    const known = this.#manners.get(registry) ?? new RangeManners();
    this.#manners.set(registry, known);
    return known;
  }

  /** Whether a registry takes one more connection. */
  #hasRoom(origin: string): boolean {
    const limit = this.#limits.get(origin)?.at(this.#nowMs) ?? NEVER;
    return this.#connectionsTo(origin) < limit;
  }

  #connectionsTo(origin: string): number {
    const isThere = ({ blob, state }: Segment) =>
      blob.registry.origin === origin && state !== "left";
    return [...this.#active].filter(isThere).length;
  }

  #connectionsInUse(): number {
    return [...this.#active].filter(({ state }) => state !== "left").length;
  }

  /** Whether it waits until a stream's reader comes near. */
  #isAhead({ place }: Segment): boolean {
    return this.#horizon !== undefined && place >= this.#horizon();
  }

  // What happens on the line.

  asked(segment: Segment, nowMs: number): void {
    segment.state = "asked";
    segment.askedAtMs = nowMs;
  }

  /** The first bytes of an answer are there. `isMiss`: a cache says that it had to fetch them. */
  answered(segment: Segment, answer?: LineAnswer): void {
    if (segment.state === "left") return;
    segment.state = "flowing";
    if (!answer) return; // a tar at hand
    const { waitMs, isRange, isMiss, isElsewhere } = answer;
    const { blob } = segment;
    const manners = this.#mannersOf(blob.registry);
    manners.answered(waitMs);
    const isFirst = !this.#waits.has(blob);
    // Nobody has to fetch that first.
    const firstWaitMs = isElsewhere ? 0 : waitMs;
    if (isFirst || !isRange) this.#waits.set(blob, isMiss ? NEVER : firstWaitMs);
    else if (this.#mostUnanswered(blob) === 1) manners.tried(waitMs, this.#firstWaitMs(blob));
  }

  /**
   * Bytes came. Where the answer holds more than the range, it goes on with what lies behind that
   * and has not come to anything yet: that costs no request.
   */
  advance(segment: Segment, sizeBytes: number, answeredTo: number): void {
    segment.at += sizeBytes;
    this.#cameBytes += sizeBytes;
    if (!segment.isComplete || segment.at >= answeredTo) return;
    const isBehind = (other: Segment) => other.at === segment.to && !other.isComplete;
    const behind = this.#queuedParts(segment.blob).find(isBehind);
    if (behind) {
      this.#takeBehind(segment, behind, answeredTo);
      return;
    }

    const parts = [...this.#partsOf(segment.blob)];
    const idle = parts.find((other) => isBehind(other) && !other.isFlowing);
    if (!idle) return;
    segment.to = idle.to;
    idle.to = idle.at;
    // The one that is tried is waited for all the same: when it is answered says something.
    if (this.#mostUnanswered(idle.blob) !== 1) this.#abandoned.push(idle);
  }

  #takeBehind(segment: Segment, behind: Segment, answeredTo: number): void {
    const unit = this.#knownUnit(segment.blob);
    segment.to = Math.min(behind.to, behind.at + unit, answeredTo);
    behind.at = segment.to;
    if (behind.isComplete) this.#dropQueued(behind);
  }

  /** Its request has ended, whether all of it came or not. */
  paused(segment: Segment): void {
    segment.state = "waiting";
  }

  /** Whether nothing else of its blob is queued or under way. */
  isLast(segment: Segment): boolean {
    return this.#partsOf(segment.blob).size === 1;
  }

  end(segment: Segment): void {
    this.#active.delete(segment);
    this.#forget(segment);
  }

  observe(nowMs: number, busyMs: number): void {
    this.#nowMs = nowMs;
    const active = [...this.#active];
    const waits = active.map(({ blob }) => this.#mannersOf(blob.registry).waitMs);
    this.#pace.observe({
      nowMs,
      cameBytes: this.#cameBytes,
      leftBytes: Math.max(0, this.#addedBytes - this.#cameBytes),
      open: active.length,
      flowing: active.filter(({ isFlowing }) => isFlowing).length,
      waitMs: Math.max(0, ...waits),
      busyMs,
    });
  }

  /** A registry whose ranges would help, if it were known how it takes to them. */
  registryToLookAt(): Registry | undefined {
    if (this.#connectionsInUse() >= this.#pace.wanted) return undefined;
    const isUnclear = (segment: Segment) => {
      const { blob, isFlowing } = segment;
      const { registry, source } = blob;
      const wantsLook = this.#mannersOf(registry).wantsLook(this.#firstWaitMs(blob));
      if (!isFlowing || source || !wantsLook) return false;
      const isWorthIt = this.#pace.maySplit && this.#isWorthCutting(segment);
      return isWorthIt || this.#queuedParts(blob).length > 0;
    };
    return [...this.#active].find(isUnclear)?.blob.registry;
  }

  /** Something small was asked for once more. Impossible: there was nothing. */
  lookedAgain(registry: Registry, look: "under way" | "impossible" | { waitMs: number }): void {
    this.#mannersOf(registry).lookedAgain(look);
  }

  /** Requests that nobody waits for any more. */
  takeAbandoned(nowMs: number): Segment[] {
    for (const segment of this.#active)
      if (this.#isLate(segment, nowMs)) this.#abandonLate(segment);
    return this.#abandoned.splice(0);
  }

  /**
   * A range that has no answer while the rest of its blob flows: it is left to the connection
   * before it, and the blob is heard to its end. If it was the first one there, no more are tried.
   */
  #abandonLate(segment: Segment): void {
    const { blob } = segment;
    if (this.#mostUnanswered(blob) <= 1) this.#mannersOf(blob.registry).isWelcome = false;
    this.#waits.set(blob, NEVER);
    if (!this.#wouldRepeat(segment) && this.giveBack(segment)) this.#abandoned.push(segment);
  }

  #isLate({ blob, at, askedAtMs, state }: Segment, nowMs: number): boolean {
    if (at === 0 || state !== "asked") return false;
    const { waitMs } = this.#mannersOf(blob.registry);
    if (nowMs - askedAtMs < 5 * waitMs + TUNING.lateMs) return false;
    return [...this.#active].some((other) => other.blob === blob && other.isFlowing);
  }

  /**
   * Leaves what has not come of a range to the connection that fetches what lies before it. False
   * where there is none.
   */
  giveBack(segment: Segment): boolean {
    const [missing] = segment.blob.missing([segment.at, segment.to]);
    segment.at = missing ? missing[0] : segment.to;
    if (segment.isComplete) return true;

    const neighbour = this.#lastBefore(segment.blob, segment.at, segment);
    if (!neighbour) return false;
    neighbour.to = Math.max(neighbour.to, segment.to);
    segment.to = segment.at;
    return true;
  }

  /** The last of a blob's ranges under way that has not gone beyond a place. */
  #lastBefore(blob: BlobState, place: number, but?: Segment): Segment | undefined {
    const isBefore = (other: Segment) =>
      other !== but && other.blob === blob && other.at <= place && !other.isComplete;
    return [...this.#active].filter(isBefore).sort((left, right) => right.at - left.at)[0];
  }

  /**
   * The registry gives only whole blobs: one connection takes all of this one along that nobody has
   * begun.
   */
  stopRanges(segment: Segment): "left to another" | "has to fetch the whole" {
    const { blob } = segment;
    blob.registry.giveUpRanges();
    const isLeft = this.giveBack(segment);
    const heir = isLeft ? this.#lastBefore(blob, blob.descriptor.size) : segment;
    if (heir) this.#absorbQueued(heir);
    return isLeft ? "left to another" : "has to fetch the whole";
  }

  /** All of its blob comes by one plain GET. False where another connection has a part of it. */
  takeWhole(segment: Segment): boolean {
    const { blob } = segment;
    const isOther = (other: Segment) => other !== segment && other.blob === blob;
    if ([...this.#active].some(isOther)) return false;

    segment.at = 0;
    segment.to = blob.descriptor.size;
    this.#absorbQueued(segment);
    return true;
  }

  #absorbQueued(segment: Segment): void {
    const isAbsorbed = (other: Segment) => other !== segment && other.at >= segment.at;
    for (const queued of this.#queuedParts(segment.blob).filter(isAbsorbed)) {
      segment.to = Math.max(segment.to, queued.to);
      this.#dropQueued(queued);
    }
  }

  /**
   * The registry takes no more connections than there are besides this one: what was to come over
   * it is queued again, and fetched by the first of them that is free. False where it was the only
   * one. Those that wait for a stream's reader would wait for this one: the furthest makes room.
   */
  crowded(segment: Segment, nowMs: number): boolean {
    const { origin } = segment.blob.registry;
    const isOther = (other: Segment) =>
      other !== segment && ["asked", "flowing"].includes(other.state);
    const others = [...this.#active].filter(
      (other) => isOther(other) && other.blob.registry.origin === origin,
    );
    if (others.length === 0) return false;

    const moving = others.filter((other) => !this.#isAhead(other)).length;
    const furthest = others.sort(inOrder).at(-1);
    if (moving === 0 && furthest) this.#leave(furthest);

    const limit = this.#limits.get(origin) ?? new ConnectionLimit();
    this.#limits.set(origin, limit);
    limit.lower(Math.max(1, moving), nowMs);
    return true;
  }

  #leave(segment: Segment): void {
    if (!segment.isComplete) this.#queueAgain(segment);
    segment.state = "left";
    this.#abandoned.push(segment);
  }

  /** Leaves a range to its neighbour, or to the first connection that is free. */
  yieldSegment(segment: Segment): void {
    if (!this.#wouldRepeat(segment) && this.giveBack(segment)) return;
    this.#queueAgain(segment);
  }

  #queueAgain(segment: Segment): void {
    this.#queued.unshift(this.#make(segment.blob, [segment.at, segment.to]));
    // What a stream needs first comes first: whoever is far ahead of it waits for it.
    if (this.#horizon) this.#queued.sort(inOrder);
    segment.to = segment.at;
  }

  /** Whether something has come already of what lies between a range and its neighbour. */
  #wouldRepeat(segment: Segment): boolean {
    const { blob, at } = segment;
    const from = this.#lastBefore(blob, at, segment)?.to ?? at;
    return from < at && lengthOf(blob.missing([from, at])) < at - from;
  }
}

/**
 * How many connections an origin takes, once it has refused one: one more is tried from time to
 * time, less and less often, since what it refused may have been a moment's trouble.
 */
class ConnectionLimit {
  #most = NEVER;
  #raiseAtMs = 0;
  #pauseMs: number = TUNING.trialPauseMs;

  lower(most: number, nowMs: number): void {
    this.#most = Math.min(most, this.#most);
    this.#raiseAtMs = nowMs + this.#pauseMs;
    this.#pauseMs *= 2;
  }

  at(nowMs: number): number {
    if (nowMs >= this.#raiseAtMs) {
      this.#most += 1;
      this.#raiseAtMs = nowMs + this.#pauseMs;
    }
    return this.#most;
  }
}

/**
 * Something changed that another may wait for: who waits looks again. The one way to wait in this
 * section.
 */
class Change {
  readonly #waiting = new Set<() => void>();

  announce(): void {
    for (const wake of this.#waiting) wake();
  }

  /** Until the next change, `signal` or the end of `atMostMs`, whichever comes first. */
  next(signal: AbortSignal, atMostMs?: number): Promise<void> {
    if (signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", wake);
        this.#waiting.delete(wake);
        resolve();
      };
      const timer = atMostMs === undefined ? undefined : setTimeout(wake, atMostMs);
      signal.addEventListener("abort", wake);
      this.#waiting.add(wake);
    });
  }

  async until(isReady: () => boolean, signal: AbortSignal): Promise<void> {
    while (!isReady()) {
      if (signal.aborted) stopped();
      await this.next(signal);
    }
  }
}

// ------ One request for a range ------

/** Bytes of a blob as they come: [position, end) of it. `doing` is what an error says of it. */
type Line = Omit<LineAnswer, "waitMs"> & Readonly<{ waitedMs: number; openedAtMs: number }>;
type Opened = Readonly<{
  stream: Readable;
  doing: string;
  position: number;
  end: number;
  /** How the line answered; a tar at hand does not. */
  line?: Line;
}>;

/** Where nginx, squid, the CDNs and RFC 9211 say whether they had to fetch. */
const CACHE_HEADERS = [
  "cache-status",
  "cf-cache-status",
  "x-cache",
  "x-cache-status",
  "x-proxy-cache",
];

/**
 * Whether a cache says that it had to fetch. "MISS, HIT" is the word of one that had not to, behind
 * another one. Varnish gives the number of this request, and of the one that fetched it before.
 */
function isCacheMiss({ headers }: Pick<Answer, "headers">): boolean {
  const words = CACHE_HEADERS.map((name) => headers[name] ?? "").join();
  const isMiss = /(^|[^a-z])miss/i.test(words) && !/(^|[^a-z]|refresh)hit/i.test(words);
  return isMiss || /^\d+$/.test(String(headers["x-varnish"] ?? ""));
}

/**
 * What of a blob an answer holds, by its status and headers, or what is wrong with it. `[at, to)`
 * is what is needed: the answer begins there or before, and has a part of it that is worth a
 * request.
 */
function judgeAnswer(
  { status, headers }: Pick<Answer, "status" | "headers">,
  [at, to]: Range,
  sizeBytes: number,
): { position: number; end: number } | { code: ErrorCode; reason: string } {
  let position = 0;
  let end = sizeBytes;
  if (status === 206) {
    const contentRange = headers["content-range"] ?? "none";
    const [, first, last, total] = /^bytes[ =](\d+)-(\d+)\/(\d+|\*)$/i.exec(contentRange) ?? [];
    position = Number(first);
    end = Number(last) + 1;
    const isTotal = total === "*" || Number(total) === sizeBytes;
    const least = Math.min(to, at + LIMITS.leastAnswerBytes);
    // more is not wrong
    const isUseful = position <= at && at < end && end >= least && end <= sizeBytes;
    if (!isTotal || !isUseful) {
      const got = outside(contentRange, 80);
      const reason = `asked for bytes ${at}-${to - 1} of ${sizeBytes}, got "${got}"`;
      return { code: "PROTOCOL", reason };
    }
  }

  const length = Number(headers["content-length"] ?? end - position);
  const isEncoded = /^(x-)?gzip$/i.test(headers["content-encoding"] ?? "");
  if (length !== end - position && !isEncoded)
    return { code: "SIZE_MISMATCH", reason: `${length} bytes, not ${end - position}` };
  return { position, end };
}

/** The first bytes are there. */
const untilNow = ({ waitedMs, openedAtMs, ...line }: Line): LineAnswer => ({
  ...line,
  waitMs: waitedMs + performance.now() - openedAtMs,
});

function openSource({ handle, offset }: Place, { at, to }: Segment): Opened {
  const stream = Readable.from(readPlace(handle, offset + at, offset + to));
  return { stream, doing: "reading a tar at hand", position: at, end: to };
}

/**
 * Asks for what a segment still lacks. Undefined where that gave nothing to read, and what to do
 * next has changed: a server that refuses a range, or does not keep to it, is asked once for the
 * whole, and no more for ranges.
 */
async function openSegment(
  schedule: Schedule,
  segment: Segment,
  signal: AbortSignal,
): Promise<Opened | undefined> {
  const { blob, at, to } = segment;
  const { descriptor, registry, source } = blob;
  const { size } = descriptor;
  if (source) return openSource(source, segment);

  const needed: Range = [at, to];
  const isRanged = registry.acceptsRanges && to - at < size;
  const range: Range = isRanged ? needed : [0, size];
  const asking = registry.blob(descriptor, ...range, signal);
  const answer = await asking.catch((error: unknown) => {
    if (!isRanged || !isRangeRefusal(error)) throw error;
    schedule.stopRanges(segment);
  });
  if (!answer?.body) return undefined;

  const { body, status } = answer;
  const doing = `GET ${redactUrl(answer.url)}`;
  const judged = judgeAnswer(answer, needed, size);
  if ("code" in judged) {
    body.destroy();
    if (!isRanged || status !== 206) fail(judged.code, `${doing}: ${judged.reason}`, { status });
    schedule.stopRanges(segment);
    return undefined;
  }
  if (isRanged && status !== 206 && schedule.stopRanges(segment) === "left to another") {
    body.destroy();
    return undefined;
  }

  const { position, end } = judged;
  const { waitedMs, isElsewhere } = answer;
  const line = {
    waitedMs,
    openedAtMs: performance.now(),
    isRange: status === 206,
    isMiss: isCacheMiss(answer),
    isElsewhere,
  };
  return { stream: await decodeBody(body, end - position), doing, position, end, line };
}

// ------ The batch writer ------

/**
 * Gathers the bytes of one range into batches, and writes them. One batch is on its way to DEST
 * while the next one is gathered; from there on `stream` waits for the disk.
 */
class BatchWriter {
  readonly #stream: Readable;
  readonly #write: (position: number, chunks: Buffer[]) => Promise<void>;
  readonly #enoughBytes: () => number;
  #position = 0; // of the batch in the blob
  #batch: Buffer[] = [];
  #batchBytes = 0;
  #underWay = 0;
  #writing: Promise<unknown> = Promise.resolve();
  #age: NodeJS.Timeout | undefined;

  /** `enoughBytes`: how large a batch may be by now. */
  constructor(
    stream: Readable,
    write: (position: number, chunks: Buffer[]) => Promise<void>,
    enoughBytes: () => number,
  ) {
    this.#stream = stream;
    this.#write = write;
    this.#enoughBytes = enoughBytes;
  }

  add(position: number, chunk: Buffer): void {
    const follows = position === this.#position + this.#batchBytes;
    if (!follows && this.#batchBytes > 0) this.#flush();
    if (!follows) this.#position = position;
    this.#age ??= setTimeout(() => this.#flush(), TUNING.batchMs);
    this.#batch.push(chunk);
    this.#batchBytes += chunk.length;
    if (this.#batchBytes >= this.#enoughBytes()) this.#flush();
  }

  /** Writes what is left, and throws what the disk said of any of it. */
  async end(): Promise<void> {
    if (this.#batchBytes > 0) this.#flush();
    await this.#writing;
  }

  #flush(): void {
    clearTimeout(this.#age);
    this.#age = undefined;
    const written = this.#write(this.#position, this.#batch).finally(() => {
      this.#underWay -= 1;
      this.#stream.resume();
    });
    this.#position += this.#batchBytes;
    this.#batch = [];
    this.#batchBytes = 0;
    this.#underWay += 1;
    if (this.#underWay > 1) this.#stream.pause();

    this.#writing = Promise.all([this.#writing, written]);
    this.#writing.catch(() => this.#stream.destroy()); // it is awaited at the end
  }
}

// ------ Files of our own ------
// The names beside DEST can be guessed, and planted where others can write: links are not followed,
// pipes and devices not waited for, and only regular files of our own are gone on with. A file is
// taken by renaming it to a name that nobody else has: of several that try one succeeds, and looks
// at what it has got.

const { O_RDONLY, O_RDWR, O_WRONLY, O_CREAT, O_EXCL } = constants;
const { O_NOFOLLOW = 0, O_NONBLOCK = 0 } = constants; // Windows has neither

type OpenFile = Readonly<{ handle: fs.FileHandle; stats: BigIntStats }>;

/** What lies at a path, links not followed; undefined where nothing does. */
async function statAt(file: string): Promise<BigIntStats | undefined> {
  try {
    return await fs.lstat(file, { bigint: true });
  } catch (error) {
    if (errorCodeOf(error) === "ENOENT") return undefined;
    throw error;
  }
}

/**
 * Device and number: what tells a file from every other, whatever its name. Under Wine an open file
 * that was renamed has no device; those that are compared lie in one folder.
 */
const identityOf = ({ dev, ino }: BigIntStats): string => `${isWindows ? "" : dev}:${ino}`;

const isSameFile = (left: BigIntStats | undefined, right: BigIntStats): boolean =>
  left !== undefined && identityOf(left) === identityOf(right);

/** Opens a regular file. Undefined where there is none, or something else. */
async function openRegular(file: string, flags = O_RDONLY): Promise<OpenFile | undefined> {
  const before = await statAt(file);
  if (!before?.isFile()) return undefined;
  const handle = await fs.open(file, flags | O_NOFOLLOW | O_NONBLOCK);
  const stats = await handle.stat({ bigint: true });
  if (stats.isFile()) return { handle, stats };
  await handle.close();
  return undefined;
}

const readAndClose = ({ handle }: OpenFile): Promise<Buffer> =>
  handle.readFile().finally(() => handle.close());

/** A file that was not there before. */
const createFile = (file: string, mode = 0o666): Promise<fs.FileHandle> =>
  fs.open(file, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, mode);

/**
 * Whether a file is like `model`, which this run made: nobody else owns it, can write to it, or has
 * another name for it. What user we are on a file system is told by the files that we make there.
 */
function isOwn(stats: BigIntStats, model: BigIntStats): boolean {
  const isOpenToOthers = (stats.mode & 0o022n & ~model.mode) !== 0n;
  return stats.isFile() && stats.uid === model.uid && stats.nlink <= 1n && !isOpenToOthers;
}

async function readOwn(file: string, model: BigIntStats): Promise<string | undefined> {
  const opened = await openRegular(file).catch(ignore);
  if (!opened) return undefined;
  if (isOwn(opened.stats, model)) return (await readAndClose(opened)).toString("utf8");
  await opened.handle.close();
  return undefined;
}

const removeQuietly = (file: string): Promise<void> => fs.unlink(file).catch(ignore);

/** Renames where the file is there. A folder of that name is no file, and nothing to take. */
async function moveFile(from: string, to: string): Promise<boolean> {
  if ((await statAt(from))?.isDirectory()) fail("DISK", `${from} is in the way: it is a directory`);
  try {
    await fs.rename(from, to);
    return true;
  } catch (error) {
    const code = errorCodeOf(error);
    if (code === "ENOENT") return false;
    if (code !== "EPERM" && code !== "EACCES") throw error;
    const words = `${from} cannot be moved aside: ${diskWords(error)} (is it another user's?)`;
    return fail("DISK", words, { cause: error });
  }
}

/** Puts a file of ours in the place of whatever is there. */
async function replaceFile(aside: string, file: string): Promise<void> {
  await fs.rename(aside, file).catch((error: unknown) => {
    const words = `${file} cannot be replaced: ${diskWords(error)}`;
    return fail("DISK", words, { cause: error });
  });
}

/** Puts back what was taken, unless another has the name by now. */
async function putBack(aside: string, file: string): Promise<void> {
  try {
    await fs.link(aside, file);
  } catch (error) {
    // no links on this file system
    if (errorCodeOf(error) !== "EEXIST") return fs.rename(aside, file);
  }
  await removeQuietly(aside);
}

/** Takes a file to a name of one's own; one that is not the one that was meant is put back. */
async function takeFile(
  file: string,
  aside: string,
  isMeant: (stats: BigIntStats) => boolean | Promise<boolean>,
): Promise<boolean> {
  if (!(await moveFile(file, aside))) return false;
  const stats = await statAt(aside);
  if (stats && (await isMeant(stats))) return true;
  await putBack(aside, file);
  return false;
}

// ------ Who is at work ------

/**
 * A run, as it signs its lock and its journal. A process number means something only within
 * `space`, the boot of a machine and a namespace of processes on it; empty where that is not known.
 * `started` tells a process from a later one of the same number.
 */
type Owner = Readonly<{
  id: string;
  pid: number;
  host: string;
  space: string;
  started: string;
}>;

/** When a process began, in the kernel's ticks; undefined for one that is none any more. */
async function startOf(pid: number | "self"): Promise<string | undefined> {
  const text = (await readOptional(`/proc/${pid}/stat`)) ?? "";
  const [state, ...fields] = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return state === "Z" || state === "X" ? undefined : fields[18];
}

async function describeSelf(): Promise<Owner> {
  const { pid } = process;
  const id = load("node:crypto").randomBytes(8).toString("hex");
  const self = { id, pid, host: os.hostname(), space: "", started: "" };
  if (process.platform !== "linux")
    return { ...self, space: `${process.platform} ${os.hostname()}` };

  const link = (file: string) => fs.readlink(file).catch(ignore);
  const [boot, namespace, started, seenPid] = await Promise.all([
    readOptional("/proc/sys/kernel/random/boot_id"),
    link("/proc/self/ns/pid"),
    startOf("self"),
    link("/proc/self"),
  ]);
  const isOurProc = seenPid === String(pid); // not that of the namespace around ours
  if (!boot || !namespace || !started || !isOurProc) return self;
  return { ...self, space: `${boot.trim()} ${namespace}`, started };
}

function parseOwner(text: string): Owner | undefined {
  const parsed = parseJson(text);
  if (!isRecord(parsed)) return undefined;
  const word = (key: string) => String(parsed[key] ?? "");
  const id = /^[0-9a-f]{16}$/.test(word("id")) ? word("id") : ""; // it becomes part of names
  const owner = { id, pid: Number(parsed.pid), host: word("host") };
  return { ...owner, space: word("space"), started: word("started") };
}

type Fate = "alive" | "dead" | "unknown";

/**
 * Whether a run is still there. What is not certain is "unknown": a process of another machine, or
 * of another namespace of this one.
 */
async function fateOf(owner: Owner, self: Owner): Promise<Fate> {
  if (owner.space === "" || owner.space !== self.space) return "unknown";
  try {
    process.kill(owner.pid, 0);
  } catch (error) {
    if (errorCodeOf(error) === "ESRCH") return "dead";
    if (errorCodeOf(error) !== "EPERM") return "unknown";
  }
  if (process.platform !== "linux") return "unknown";
  return (await startOf(owner.pid)) === owner.started ? "alive" : "dead";
}

// ------ Lock ------
// Two runs at one DEST would do the work twice: the second stops. That DEST stays right does not
// hang on the lock, for a process can sleep through the loss of it: what a run writes to and what
// it gives DEST's name are files of its own.

/**
 * A lock as it was seen: one that says nothing was left half-written, and one that may not be read
 * is another user's.
 */
type SeenLock = Readonly<{ stats: BigIntStats; owner: Owner | "unreadable" | undefined }>;

async function readLock(file: string): Promise<SeenLock | undefined> {
  const stats = await statAt(file);
  if (!stats?.isFile()) return stats && { stats, owner: undefined };
  try {
    const opened = await openRegular(file);
    if (!opened) return undefined;
    const reading = readAt(opened.handle, 0, LIMITS.lockBytes);
    const bytes = await reading.finally(() => opened.handle.close());
    return { stats: opened.stats, owner: parseOwner(bytes.toString("utf8")) };
  } catch (error) {
    return errorCodeOf(error) === "ENOENT" ? undefined : { stats, owner: "unreadable" };
  }
}

class Lock {
  readonly owner: Owner;
  /** A file that this run made beside DEST. */
  readonly model: BigIntStats;
  readonly #file: string;
  readonly #aside: string;
  #handle: fs.FileHandle;
  #timer: NodeJS.Timeout | undefined;

  private constructor(file: string, owner: Owner, handle: fs.FileHandle, model: BigIntStats) {
    this.#file = file;
    this.#aside = `${file}.${owner.id}`;
    this.owner = owner;
    this.model = model;
    this.#handle = handle;
  }

  /** Written under a name of its own and then linked: a lock that is there says who has it. */
  static async acquire(file: string, dest: string): Promise<Lock> {
    const owner = await describeSelf();
    const aside = `${file}.${owner.id}`;
    const handle = await createFile(aside);
    try {
      await handle.write(JSON.stringify(owner), 0);
      const lock = new Lock(file, owner, handle, await handle.stat({ bigint: true }));
      await lock.#settle(dest);
      lock.#timer = setInterval(() => lock.#beat(), LIMITS.lockBeatMs).unref();
      return lock;
    } catch (error) {
      await handle.close();
      throw error;
    } finally {
      await removeQuietly(aside);
    }
  }

  /**
   * Until the lock is ours, or is seen to be another's. A bound, since somebody may come first each
   * time.
   */
  async #settle(dest: string): Promise<void> {
    for (let attempt = 0; attempt < 8; attempt += 1) {
      if (await this.#isPlaced()) return;
      let seen = await readLock(this.#file);
      if (seen && !seen.owner) {
        // where there are no links, it is written after it is there
        await delay(LIMITS.lockBirthMs);
        seen = await readLock(this.#file);
      }
      if (!seen) continue;
      const words = await this.#whoHasIt(seen);
      if (words !== undefined)
        fail("DISK", `${dest} is being pulled by another imgpull${words}: wait, or name another`);
      await this.#takeOver(seen.stats);
    }
    fail("DISK", `${dest} is being pulled by another imgpull`);
  }

  async #isPlaced(): Promise<boolean> {
    try {
      await fs.link(this.#aside, this.#file);
      return true;
    } catch (error) {
      if (errorCodeOf(error) === "EEXIST") return false;
    }
    // A file system without links, or the reason for which no file can be made here.
    try {
      const handle = await createFile(this.#file);
      await this.#handle.close();
      this.#handle = handle;
    } catch (error) {
      if (errorCodeOf(error) === "EEXIST") return false;
      throw error;
    }
    try {
      await this.#handle.write(JSON.stringify(this.owner), 0);
      return true;
    } catch (error) {
      await removeQuietly(this.#file); // a lock that says nothing would hold the others up
      throw error;
    }
  }

  /**
   * Who has a lock, in words; undefined where it is left behind. Whoever is not known to live or to
   * be dead lives as long as the lock is touched, by the clock of the file system, on which ours is
   * a moment old.
   */
  async #whoHasIt({ stats, owner }: SeenLock): Promise<string | undefined> {
    if (!owner) return undefined;
    const isKnown = owner !== "unreadable";
    const fate = isKnown ? await fateOf(owner, this.owner) : "unknown";
    const who = isKnown ? printable(`process ${owner.pid} on ${owner.host}`, 80) : "another user's";
    if (fate === "alive") return ` (${who})`;
    if (fate === "dead") return undefined;

    const ageMs = Number(this.model.mtimeMs - stats.mtimeMs);
    const isLapsed = ageMs >= LIMITS.lockStaleMs;
    if (isLapsed || ageMs < -LIMITS.lockBeatMs) return undefined; // nobody touches it in the future
    const seconds = (milliseconds: number) => Math.max(1, Math.ceil(milliseconds / 1000));
    const remedy = `if that one is gone, its lock lapses in ${seconds(LIMITS.lockStaleMs - ageMs)} s`;
    return ` (${who}, seen ${seconds(ageMs)} s ago)\n  ${remedy}`;
  }

  /**
   * Takes a lock away that was left behind, as it was seen: another may have done so meanwhile, and
   * have it now.
   */
  async #takeOver(seen: BigIntStats): Promise<void> {
    const aside = `${this.#aside}.old`;
    const isSeen = (stats: BigIntStats) =>
      isSameFile(stats, seen) && stats.mtimeNs === seen.mtimeNs;
    if (await takeFile(this.#file, aside, isSeen)) await removeQuietly(aside);
  }

  /** A write rather than a date: the file system's own clock counts, and never another's file. */
  #beat(): void {
    this.#handle.write(JSON.stringify(this.owner), 0).catch(ignore);
  }

  /** Whether the file under a name is the one that we made, and says what we wrote. */
  async #isOwn(file: string): Promise<boolean> {
    const stats = await this.#handle.stat({ bigint: true });
    if (!isSameFile(await statAt(file), stats)) return false;
    const bytes = await readAt(this.#handle, 0, LIMITS.lockBytes);
    return parseOwner(bytes.toString("utf8"))?.id === this.owner.id;
  }

  async assertOurs(dest: string): Promise<void> {
    if (await this.isOurs()) return;
    fail("DISK", `cannot write ${dest}: another imgpull took it over; run it again`);
  }

  /**
   * Whether nobody has taken the lock over. One that looked at it may have it in hand for a moment.
   */
  async isOurs(): Promise<boolean> {
    for (let attempt = 0; attempt < 3; attempt += 1) {
      if (await this.#isOwn(this.#file)) return true;
      if (await statAt(this.#file)) return false;
      await delay(20);
    }
    return false;
  }

  /** Lets go of it, and of nobody else's. Never an error: it would hide why a pull failed. */
  async release(): Promise<void> {
    clearInterval(this.#timer);
    // on Windows the name that it was made under goes with its handle only
    const aside = `${this.#aside}.old`;
    const isOwn = () => this.#isOwn(aside);
    const isTaken = await takeFile(this.#file, aside, isOwn).catch(ignore);
    if (!isTaken) await this.#handle.truncate().catch(ignore); // one without a word holds nobody
    await this.#handle.close().catch(ignore);
    if (isTaken) await removeQuietly(aside);
  }
}

// ------ Journal ------

/**
 * What a journal says of an earlier run: whose it was, which file it wrote to, whether it closed
 * that, what was in place.
 */
type Notes = Readonly<{
  planId: string;
  owner: Owner | undefined;
  partial: string;
  isClosed: boolean;
  inPlace: ReadonlyMap<string, Ranges>;
}>;

/** The last whole line of each blob counts. */
function parseNotes(text: string): Notes {
  const [planId = "", ...lines] = text.split("\n");
  const inPlace = new Map<string, Ranges>();
  let owner: Owner | undefined;
  let partial = "";
  for (const line of lines) {
    const [, digest = "", rangeText = ""] = /^(\S+) ([\d,-]*);$/.exec(line) ?? [];
    const [, identity, signature] = /^by (\S+) (\{.*\})$/.exec(line) ?? [];
    if (identity !== undefined) {
      partial = identity;
      owner = parseOwner(signature ?? "");
    }
    let ranges: Ranges = [];
    for (const range of rangeText.split(",")) {
      const [from = 0, to = 0] = range.split("-").map(Number);
      if (from < to) ranges = addRange(ranges, [from, to]);
    }
    inPlace.set(digest, ranges);
  }
  return { planId, owner, partial, isClosed: lines.includes("closed"), inPlace };
}

/**
 * What is in place, a line at a time, true after a kill -9: the plan's id, who writes to which
 * file, then `digest from-to,…;`, and `closed` once nothing more will be written.
 */
class Journal {
  readonly #file: string;
  readonly #handle: fs.FileHandle;
  readonly #inPlace: ReadonlyMap<string, Ranges>;

  private constructor(file: string, handle: fs.FileHandle, inPlace: ReadonlyMap<string, Ranges>) {
    this.#file = file;
    this.#handle = handle;
    this.#inPlace = inPlace;
  }

  static async read(file: string, model: BigIntStats): Promise<Notes> {
    return parseNotes((await readOwn(file, model)) ?? "");
  }

  /** A journal of this run's own, which goes on from what an earlier one says. */
  static async begin(
    file: string,
    owner: Owner,
    { planId, partial, inPlace }: Pick<Notes, "planId" | "partial" | "inPlace">,
  ): Promise<Journal> {
    const aside = `${file}.${owner.id}`;
    const handle = await createFile(aside);
    const journal = new Journal(file, handle, inPlace);
    try {
      await handle.write(`${planId}\nby ${partial || "-"} ${JSON.stringify(owner)}\n`);
      for (const [digest, ranges] of inPlace) journal.#recordRanges(digest, ranges);
      await replaceFile(aside, file);
      return journal;
    } catch (error) {
      await handle.close();
      await removeQuietly(aside);
      throw error;
    }
  }

  rangesOf(digest: string): Ranges {
    return this.#inPlace.get(digest) ?? [];
  }

  /**
   * At once, for a line takes microseconds: one that queued behind the blobs' own writes would come
   * too late.
   */
  record(blob: BlobState): void {
    blob.markRecorded(performance.now());
    this.#recordRanges(blob.descriptor.digest, blob.inPlace);
  }

  #recordRanges(digest: string, ranges: Ranges): void {
    this.#append(`${digest} ${ranges.map((range) => range.join("-")).join(",")};\n`);
  }

  #append(text: string): void {
    try {
      appendFileSync(this.#handle.fd, text);
    } catch {
      // losing a line costs bytes only
    }
  }

  /** Nothing more is written to what it speaks of: the next run may go on in the very same file. */
  async close(): Promise<void> {
    this.#append("closed\n");
    await this.#handle.close();
  }

  /** There is nothing to go on from. Another's journal under that name is left alone. */
  async remove(): Promise<void> {
    const stats = await this.#handle.stat({ bigint: true });
    await this.#handle.close();
    if (isSameFile(await statAt(this.#file), stats)) await removeQuietly(this.#file);
  }
}

// ------ Fence ------

/** FILE.partial.ID is what one run alone uses, by its id; of a journal and a lock likewise. */
const ASIDE_NAME = /^(.*\.partial)(\.journal|\.lock)?\.([0-9a-f]{16})(\.old|\.copy)?$/;

type Fenced = Readonly<{
  folder: string;
  /** Whether a `FILE.partial` there is of this destination. */
  isOurs: (partial: string) => boolean;
  deadId: string | undefined;
  lock: Lock;
}>;

/**
 * Whoever had the lock before, and sleeps, can no longer give anything a name: what it made under
 * names of its own is removed, and it looks for its lock only once that is there. What a run left
 * that is certainly over is taken up.
 */
async function fenceOff({ folder, isOurs, deadId, lock }: Fenced): Promise<void> {
  const names = await listOptional(folder);
  // whoever takes it over from now on makes files that are not on this list
  await lock.assertOurs(folder);
  for (const name of names) {
    const [, partial = "", kind, id, ending] = ASIDE_NAME.exec(name) ?? [];
    if (!isOurs(partial) || id === lock.owner.id) continue;
    const file = path.join(folder, name);
    const isLeft = id === deadId && kind === undefined && ending === undefined;
    if (isLeft) await fs.rename(file, path.join(folder, partial)).catch(ignore);
    else await removeQuietly(file);
  }
}

/** The run whose journal lies there, if it is certainly over. */
async function findDeadId(
  journalFile: string,
  { model, owner }: Lock,
): Promise<string | undefined> {
  const before = (await Journal.read(journalFile, model)).owner;
  return before && (await fateOf(before, owner)) === "dead" ? before.id : undefined;
}

// ------ The transfer ------
// All blobs of a plan over the line and into a sink. What a blob's bytes are worth is decided here:
// verify, record, fetch once more.

/** Where bytes go. It writes, and decides nothing. */
type Sink = Readonly<{
  /** Bytes are wanted in the order of the plan: how far into the tar one may begin now. */
  horizon?: () => number;
  write: (blob: BlobState, position: number, chunks: Buffer[]) => Promise<void>;
  /** What was written. A stream has none: what went out is verified on its way. */
  readBack?: (blob: BlobState, range: Range) => AsyncIterable<Buffer>;
  /** The blob is verified: its file may have its name. */
  seal?: (blob: BlobState) => Promise<void>;
  /** All blobs are there. */
  end?: () => Promise<void>;
}>;

type Observer = (transfer: Transfer, finished?: BlobState) => void;

type TransferOptions = Readonly<{
  session: Session;
  /** What an earlier run has put in place is marked already. */
  blobs: readonly BlobState[];
  sink: Sink;
  observe: Observer;
  journal?: Journal;
  /** Bytes of blobs that were there, and are none of `blobs`. */
  keptBytes?: number;
}>;

/** Whether a server may have refused one connection more than it takes. */
function isPushback(error: unknown): error is ImgpullError {
  if (!(error instanceof ImgpullError)) return false;
  const { code, status, cause } = error;
  return code === "RATE_LIMITED" || status === 503 || (code === "NETWORK" && cause !== undefined);
}

/** Whether it says so, or takes no connection at all. */
const isRefusal = ({ code, cause }: ImgpullError): boolean =>
  code !== "NETWORK" || errorCodeOf(cause) === "ECONNREFUSED";

class Transfer {
  readonly blobs: readonly BlobState[];
  readonly totalBytes: number;
  readonly signal: AbortSignal;

  readonly #session: Session;
  readonly #sink: Sink;
  readonly #observe: Observer;
  readonly #journal: Journal | undefined;
  readonly #schedule: Schedule;
  readonly #change = new Change();
  readonly #stopping = new AbortController();
  readonly #room: EarlyRoom | undefined;
  readonly #running = new Set<Promise<void>>();
  readonly #leaving = new Map<Segment, AbortController>();
  readonly #catchingUp = new Map<BlobState, Promise<void>>();
  readonly #crowded = new Set<string>(); // origins that were told of
  readonly #reset = new Set<BlobState>(); // blobs that came to nothing while others moved
  readonly #silent = new Set<BlobState>(); // of which a range was waited for in vain
  readonly #failures: PromiseRejectedResult[] = [];
  #fetchedBytes = 0;
  #doneBytes: number; // of all blobs, as they say it one by one
  #blobsDone = 0;
  readonly #keptBytes: number;
  #isUnchanged = false;

  constructor(options: TransferOptions) {
    const { session, blobs, sink, observe, journal, keptBytes = 0 } = options;
    this.signal = anySignal(session.signal, this.#stopping.signal);
    this.#session = { ...session, signal: this.signal };
    this.blobs = blobs;
    this.totalBytes = sizeOf(blobs);
    this.#doneBytes = sumOf(blobs, ({ doneBytes }) => doneBytes);
    this.#keptBytes = keptBytes;
    this.#sink = sink;
    this.#room = sink.readBack && new EarlyRoom();
    this.#observe = observe;
    this.#journal = journal;
    const { horizon } = sink;
    const most = session.settings.concurrency;
    this.#schedule = new Schedule({ most, ...(horizon && { horizon }) });
  }

  /** Bytes that have come, whether they are in place yet or not; and blobs that are whole. */
  get doneBytes(): number {
    return this.#doneBytes;
  }
  get blobsDone(): number {
    return this.#blobsDone;
  }
  /** All that came over the line; and of what is in place, what did not have to. */
  get fetchedBytes(): number {
    return this.#fetchedBytes;
  }
  get reusedBytes(): number {
    return this.#keptBytes + sumOf(this.blobs, ({ reusedBytes }) => reusedBytes);
  }
  get resumedBytes(): number {
    return sumOf(this.blobs, ({ resumedBytes }) => resumedBytes);
  }
  get activeBlobs(): Set<BlobState> {
    return this.#schedule.activeBlobs;
  }

  /** Whether DEST was already what it had to become, and was left alone. */
  get isUnchanged(): boolean {
    return this.#isUnchanged;
  }

  /** DEST has a blob in its place, and it was verified there. */
  keep(blob: BlobState): void {
    blob.keep();
    this.#doneBytes += blob.doneBytes;
    this.#blobsDone += 1;
    this.#observe(this);
  }

  markUnchanged(): void {
    this.#isUnchanged = true;
  }

  /** Ends all that is under way for an error, and throws that on. */
  readonly stop = (error: unknown): never => {
    this.#stopping.abort();
    throw error;
  };

  /** The same within `run`, which throws it at its end. */
  readonly #fail = (reason: unknown): void => {
    this.#failures.push({ status: "rejected", reason });
    this.#stopping.abort();
  };

  /** To the end of all blobs, or to the first error with every connection closed. */
  async run(): Promise<void> {
    this.#observe(this);
    this.#schedule.add(this.blobs);
    while (!this.#schedule.isOver && !this.signal.aborted) {
      this.#lookRound();
      await this.#change.next(this.signal, TUNING.tickMs);
      // What has come is read first, see startDeadline: no range is late that lies in our buffers.
      await new Promise(setImmediate);
    }

    await Promise.all(this.#running);
    settled(this.#failures);
    if (this.signal.aborted) stopped();
    await this.#sink.end?.();
  }

  /** What has changed, and what follows from it. */
  #lookRound(): void {
    const nowMs = performance.now();
    this.#schedule.observe(nowMs, performance.eventLoopUtilization().active);
    for (const segment of this.#schedule.takeAbandoned(nowMs)) this.#leaving.get(segment)?.abort();
    const registry = this.#schedule.registryToLookAt();
    if (registry) this.#lookAgain(registry);

    for (let next = this.#schedule.next(); next; next = this.#schedule.next()) this.#start(next);
  }

  /**
   * Asks once more for something small that has come already: a cache has it now, and answers
   * sooner than before.
   */
  #lookAgain(registry: Registry): void {
    const small = this.#smallOf(registry);
    if (!small) this.#schedule.lookedAgain(registry, "impossible");
    if (!small?.isDone) return; // soon

    this.#schedule.lookedAgain(registry, "under way");
    const ask = () => this.#waitFor(small);
    const isFromLine = small.resumedBytes + small.reusedBytes === 0; // and asked for once already
    const looking = isFromLine ? ask() : ask().then(ask);
    looking.then(
      (waitMs) => {
        this.#schedule.lookedAgain(registry, { waitMs });
        this.#change.announce();
      },
      () => this.#schedule.lookedAgain(registry, "impossible"),
    );
  }

  #smallOf(registry: Registry): BlobState | undefined {
    const isSmall = ({ descriptor, registry: its }: BlobState) =>
      its === registry && descriptor.size > 0 && descriptor.size <= TUNING.smallBytes;
    return this.blobs.find((blob) => isSmall(blob) && !blob.source);
  }

  /** How long the answer for a small blob takes, which is heard to its end. */
  async #waitFor({ descriptor, registry }: BlobState, signal = this.signal): Promise<number> {
    const { body, waitedMs } = await registry.blob(descriptor, 0, descriptor.size, signal);
    if (body) await finished(body.resume());
    return waitedMs;
  }

  #start(segment: Segment): void {
    const running = this.#serve(segment).catch(this.#fail);
    this.#running.add(running);
    running.then(() => {
      this.#running.delete(running);
      this.#change.announce();
    });
  }

  async #serve(segment: Segment): Promise<void> {
    await this.#fetch(segment);
    if (this.#schedule.isLast(segment)) await this.#finishBlob(segment.blob);
    this.#schedule.end(segment);
  }

  /**
   * Fetches a range to its end, however many answers that takes; or until another connection has
   * taken it over, which ends a wait for the next attempt, too.
   */
  async #fetch(segment: Segment): Promise<void> {
    const leaving = new AbortController();
    this.#leaving.set(segment, leaving);
    const signal = anySignal(this.signal, leaving.signal);
    try {
      await this.#fetchPatiently(segment, signal);
    } catch (error) {
      const isLeft = segment.isComplete && leaving.signal.aborted && !this.signal.aborted;
      if (!isLeft) throw error;
    } finally {
      this.#leaving.delete(segment);
    }
  }

  #fetchPatiently(segment: Segment, signal: AbortSignal): Promise<void> {
    let before = segment.at;
    // Getting on means more than a trickle: otherwise a server that sends a byte a time would be
    // asked for ever.
    const gotOn = () => {
      const enough = Math.min(TUNING.batchBytes, Math.ceil(segment.blob.descriptor.size / 64));
      const isEnough = segment.at - before >= enough;
      before = segment.at;
      return isEnough;
    };

    const attempt = async () => {
      while (!segment.isComplete) await this.#receiveOrYield(segment, signal);
    };
    return withRetries({ ...this.#session, signal }, attempt, gotOn);
  }

  /**
   * A server that refuses one connection while others move gets fewer: that costs no attempt. When
   * it says to come back later, that is waited for all the same.
   */
  async #receiveOrYield(segment: Segment, signal: AbortSignal): Promise<void> {
    const { at } = segment;
    this.#schedule.asked(segment, performance.now());
    try {
      await this.#receive(segment, signal);
    } catch (error) {
      if (segment.isComplete) return; // left to another meanwhile
      const isRefused = isPushback(error) && segment.at === at && !this.signal.aborted;
      if (isRefused && (await this.#isExcused(segment, error, signal))) return;
      if (segment.at === at && (await this.#isOnlyTheRange(segment, error))) return;
      const { registry, descriptor, source } = segment.blob;
      if (source || !registry.canAskElsewhere(descriptor.digest, error)) throw error;
    } finally {
      this.#schedule.paused(segment);
    }
  }

  /** Whether others move, so that this is no failure. */
  async #isExcused(segment: Segment, error: ImgpullError, signal: AbortSignal): Promise<boolean> {
    const { retryAfterMs = 0 } = error;
    if (retryAfterMs > LIMITS.retryAfterMs) return false;
    if (!this.#schedule.crowded(segment, performance.now())) return false;
    // A connection that is only lost may be the blob's own trouble: that is seen when it comes.
    if (isRefusal(error)) this.#tellOfCrowd(segment.blob.registry);
    else this.#reset.add(segment.blob);
    this.#schedule.paused(segment);
    if (retryAfterMs > 0) await this.#session.clock.sleep(retryAfterMs, signal).catch(ignore);
    else this.#schedule.yieldSegment(segment);
    return true;
  }

  /**
   * Whether a range was met with silence twice, by a registry that answers all the same: a cache
   * fetches what lies before it, or somebody keeps ranges back. The whole begins to come at once.
   */
  async #isOnlyTheRange(segment: Segment, error: unknown): Promise<boolean> {
    const isSilence = error instanceof ImgpullError && error.code === "TIMEOUT";
    const { blob } = segment;
    const small = this.#smallOf(blob.registry);
    if (!isSilence || segment.at === 0 || blob.source || !small) return false;
    const isSecond = this.#silent.has(blob);
    this.#silent.add(blob);
    if (!isSecond) return false;

    const signal = anySignal(this.signal, AbortSignal.timeout(LIMITS.diagnosisMs));
    const isThere = await this.#waitFor(small, signal).then(
      () => true,
      () => false,
    );
    return isThere && this.#schedule.takeWhole(segment);
  }

  #tellOfCrowd({ origin }: Registry): void {
    if (this.#crowded.has(origin)) return;
    this.#crowded.add(origin);
    this.#session.warn(`${origin} refuses more connections: going on with fewer`);
  }

  /** One request for what a segment still lacks, and its bytes into the sink. */
  async #receive(segment: Segment, signal: AbortSignal): Promise<void> {
    const { blob } = segment;
    const opened = await openSegment(this.#schedule, segment, signal);
    if (!opened) return;

    const { stream, doing, end, line } = opened;
    let { position } = opened;
    const write = (at: number, chunks: Buffer[]) => this.#write(blob, at, chunks);
    const writer = new BatchWriter(stream, write, () => this.#enoughBytes());
    // Events rather than an iterator, which makes promises for each chunk.
    stream.on("data", (chunk: Buffer) => {
      if (!segment.isFlowing) this.#schedule.answered(segment, line && untilNow(line));
      const start = position;
      position += chunk.length;
      // Its end may move on while it takes the chunk in.
      while (!segment.isComplete && segment.at >= start && segment.at < position) {
        const wanted = chunk.subarray(segment.at - start).subarray(0, segment.remainingBytes);
        for (const piece of this.#accept(segment, wanted, end)) writer.add(...piece);
      }
      // More than belongs there, or another connection has taken the rest over: no need to hear it
      // to its end.
      if (position > end || (segment.isComplete && position < end)) stream.destroy();
    });

    const cause = await finished(stream, { signal }).then(ignore, (error) => error);
    stream.destroy();
    await writer.end();
    if (position > end)
      fail("SIZE_MISMATCH", `${doing}: more than the ${end} bytes that belong there`);
    if (segment.isComplete) return;
    if (this.signal.aborted) stopped();
    if (cause instanceof ImgpullError || (cause && blob.source)) throw cause;
    if (position < end) {
      const reason = `the connection ended after ${position} of ${end} bytes`;
      fail("NETWORK", `${doing}: ${reason}`, { cause });
    }
  }

  #accept(segment: Segment, bytes: Buffer, answeredTo: number) {
    const { blob } = segment;
    if (this.#reset.delete(blob)) this.#tellOfCrowd(blob.registry);
    const pieces = blob.accept(segment.at, bytes, this.#room);
    this.#schedule.advance(segment, bytes.length, answeredTo);
    const newBytes = sumOf(pieces, ([, piece]) => piece.length);
    this.#doneBytes += newBytes;
    if (!blob.source) this.#fetchedBytes += newBytes;
    return pieces;
  }

  /** Of one batch: the more connections there are, the less each of them may gather. */
  #enoughBytes(): number {
    return Math.min(TUNING.batchBytes, TUNING.gatherBytes / this.#schedule.connections);
  }

  async #write(blob: BlobState, position: number, chunks: Buffer[]): Promise<void> {
    this.#observe(this);
    const sizeBytes = sumOf(chunks, ({ length }) => length);
    await this.#sink.write(blob, position, chunks);
    blob.markWritten(position, sizeBytes);
    if (blob.isRecordDue(performance.now())) this.#journal?.record(blob);
    this.#catchUp(blob);
  }

  /** Hashes what came out of order and is in place by now, while the line works. */
  #catchUp(blob: BlobState): void {
    if (this.#catchingUp.has(blob) || !blob.toReadBack()) return;
    const catchingUp = this.#readBack(blob).catch(this.#fail);
    this.#catchingUp.set(blob, catchingUp);
    catchingUp.then(() => this.#catchingUp.delete(blob));
  }

  async #readBack(blob: BlobState): Promise<void> {
    const { readBack } = this.#sink;
    if (!readBack) return;
    for (let range = blob.toReadBack(); range; range = blob.toReadBack()) {
      let [position] = range;
      for await (const piece of readBack(blob, range)) {
        blob.hashInOrder(position, piece, this.#room);
        position += piece.length;
      }
    }
  }

  /** All bytes of a blob were written: are they the right ones? */
  async #finishBlob(blob: BlobState): Promise<void> {
    if (await this.#isVerified(blob)) {
      blob.markDone();
      this.#blobsDone += 1;
      this.#observe(this, blob);
      return;
    }
    this.#judgeWrongBytes(blob);
    this.#schedule.add([blob]);
  }

  async #isVerified(blob: BlobState): Promise<boolean> {
    if (!this.#sink.readBack) return true;
    await this.#catchingUp.get(blob);
    await this.#readBack(blob);
    if (!blob.verify()) return false;

    await this.#sink.seal?.(blob);
    this.#journal?.record(blob);
    return true;
  }

  /** Another source is asked, and the registry once more, with a warning; then it is an error. */
  #judgeWrongBytes(blob: BlobState): void {
    const { descriptor, registry } = blob;
    const words = `${descriptor.digest}: the bytes have another digest`;
    const lie = new ImgpullError("DIGEST_MISMATCH", words);
    const isFromMirror = !blob.source && registry.canAskElsewhere(descriptor.digest, lie);
    this.#doneBytes -= blob.doneBytes;
    const { liar, isLast } = blob.restart(isFromMirror, this.#room);
    if (liar === "source" || isFromMirror) return;

    if (isLast) {
      this.#journal?.record(blob); // nothing of it is worth keeping
      const remedy = "ask who runs it, or one of `mirrors`";
      fail("DIGEST_MISMATCH", `${words}, twice, from ${registry.origin}: ${remedy}`);
    }
    this.#session.warn(`${words}; fetching the blob once more`);
  }
}

// ------ Destinations ------
// A tar and a folder keep what has come under another name until all is right; a stream cannot take
// back what is sent, and lacks its trailer until then.

type Destination =
  | Readonly<{ kind: "stream"; output: NodeJS.WritableStream }>
  | Readonly<{ kind: "device"; file: string }>
  | Readonly<{ kind: "layout"; folder: string }>
  | Readonly<{ kind: "tar"; file: string }>;

type PullJob = Readonly<{ session: Session; plan: Plan; tars: Tars; observe: Observer }>;

/**
 * Windows takes these for devices, whatever follows the first dot; Node makes files of them that
 * few can remove.
 */
const DEVICE_NAME = /^(con|prn|aux|nul|com\d|lpt\d)\s*($|[.:])/i;

/** Where a link leads to a file that is not there yet: it is made there, and the link stays. */
async function resolveLink(file: string): Promise<string> {
  const link = await fs.readlink(file).catch(ignore);
  if (link === undefined) return file;
  const target = path.resolve(await fs.realpath(path.dirname(file)), link);
  return resolveLink(target);
}

/**
 * The path of the file itself. A loop of links is an error: it leads to no file, and none of them
 * may be replaced.
 */
async function resolveFile(file: string): Promise<string> {
  try {
    return await fs.realpath(file);
  } catch (error) {
    if (errorCodeOf(error) !== "ENOENT") throw error;
    return resolveLink(file);
  }
}

/**
 * \\?\C:\x is C:\x: Node says no to the root of a drive in that form, and puts it there itself
 * where it is needed.
 */
const withoutPrefix = (file: string): string =>
  file.replace(/^\\\\\?\\UNC\\/i, "\\\\").replace(/^\\\\\?\\/, "");

/**
 * DEST, before anything is asked: an existing directory or a path that ends in "/" is an OCI
 * layout.
 */
async function parseDestination(destination: string | NodeJS.WritableStream): Promise<Destination> {
  if (typeof destination !== "string") return { kind: "stream", output: destination };
  return parseFileDestination(isWindows ? withoutPrefix(destination) : destination);
}

async function parseFileDestination(destination: string): Promise<Destination> {
  const doing = `cannot write ${destination}`;
  if (isWindows && DEVICE_NAME.test(path.basename(destination)))
    fail("DISK", `${doing}: that name is a device of Windows (- is stdout)`);

  const stats = await fs.stat(destination).catch(ignore);
  if (/[\\/]$/.test(destination) || stats?.isDirectory())
    return { kind: "layout", folder: destination };
  if (stats?.isFIFO() || stats?.isCharacterDevice()) return { kind: "device", file: destination };
  if (stats?.isFile() === false)
    fail("DISK", `${doing}: it is there, and not a file (- is stdout)`);

  const folder = path.dirname(destination);
  const checking = fs.access(`${folder}/.`, constants.W_OK);
  await onDisk(`${doing}: the directory ${folder}`, checking);
  if (!(await fs.stat(folder)).isDirectory())
    // of a file, Windows has a "." too
    fail("DISK", `${doing}: the directory ${folder}: ${DISK_WORDS.ENOTDIR}`);
  return { kind: "tar", file: await onDisk(doing, resolveFile(destination)) };
}

/** A plan's bytes into DEST. */
async function pullInto(destination: Destination, job: PullJob): Promise<Transfer> {
  switch (destination.kind) {
    case "stream":
      return pullToStream(job, destination.output);
    case "device":
      return pullToDevice(job, destination.file);
    case "layout":
      return pullToLayout(job, destination.folder);
    case "tar": {
      const { file } = destination;
      return pullToTar(job, file).catch(tellOfInodes(path.dirname(file)));
    }
  }
}

/** Writes all, however often that takes. */
async function writeAll(
  handle: fs.FileHandle,
  chunks: readonly Buffer[],
  position: number,
): Promise<void> {
  const { bytesWritten } = await handle.writev(chunks, position);
  if (bytesWritten === sumOf(chunks, ({ length }) => length)) return;
  const rest = Buffer.concat(chunks).subarray(bytesWritten);
  await writeAll(handle, [rest], position + bytesWritten);
}

/**
 * Sync where the file system and Node's permission model let us; what they refuse is no reason to
 * fail.
 */
async function syncQuietly(handle: fs.FileHandle): Promise<void> {
  await handle.sync().catch((error: unknown) => {
    if (!["ERR_ACCESS_DENIED", "EINVAL", "ENOSYS", "ENOTSUP", "EPERM"].includes(errorCodeOf(error)))
      throw error;
  });
}

/** Runs with a folder that may have to be made. Where that fails, none made for it stays empty. */
async function inFolder<T>(folder: string, run: () => Promise<T>): Promise<T> {
  const first = await fs.mkdir(folder, { recursive: true });
  const made: string[] = [];
  const top = path.resolve(first ?? path.join(folder, "nothing was made"));
  for (let at = path.resolve(folder); at.length >= top.length; at = path.dirname(at)) made.push(at);
  try {
    return await run();
  } catch (error) {
    await removeEmpty(made);
    throw error;
  }
}

/** The deepest of them come first. */
async function removeEmpty(folders: readonly string[]): Promise<void> {
  for (const folder of folders) await fs.rmdir(folder).catch(ignore);
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await fs.open(folder, "r").catch(ignore); // Windows has no handle for a folder
  if (handle) await syncQuietly(handle).finally(() => handle.close());
}

/**
 * `place` is a path on the file system that is asked. One that reports no blocks at all has no
 * bound (ramfs, FUSE).
 */
async function checkFreeSpace(dest: string, place: string, neededBytes: number): Promise<void> {
  const { blocks, bavail, bsize } = await fs
    .statfs(place)
    .catch(() => ({ blocks: 0, bavail: 0, bsize: 1 }));
  const freeBytes = blocks === 0 ? NEVER : bavail * bsize;
  if (neededBytes <= freeBytes) return;
  const words = `${formatBytes(neededBytes)} are needed and ${place} has ${formatBytes(freeBytes)} free`;
  fail("DISK", `cannot write ${dest}: the disk is full, ${words}`);
}

/**
 * A file system without inodes says that it is full, though it may have any room. Those that we
 * gave back do not count.
 */
const tellOfInodes =
  (folder: string) =>
  async (error: unknown): Promise<never> => {
    const counts =
      errorCodeOf(error) === "ENOSPC" ? await fs.statfs(folder).catch(ignore) : undefined;
    const isWithoutInodes = counts && counts.files > 0 && counts.ffree < 16 && counts.bavail > 0;
    throw isWithoutInodes ? Object.assign(error as Error, { code: "NO_INODES" }) : error;
  };

/**
 * Syncs in the background, so that the disk works while the line does and little is left for the
 * end. One after the other: an error of the disk is told to one sync only, and may not be lost.
 */
class BackgroundSync {
  #unsyncedBytes = 0;
  #syncing: Promise<void> = Promise.resolve();

  async written(handle: fs.FileHandle, sizeBytes: number): Promise<void> {
    this.#unsyncedBytes += sizeBytes;
    if (this.#unsyncedBytes < TUNING.syncBytes) return;
    this.#unsyncedBytes = 0;
    const before = this.#syncing;
    this.#syncing = before.then(() => syncQuietly(handle));
    this.#syncing.catch(ignore); // it is awaited by the next, or at the end
    await before;
  }

  end(): Promise<void> {
    return this.#syncing;
  }
}

/** The file in which a blob has its place. */
type OpenPlace = (blob: BlobState) => Promise<fs.FileHandle>;

/** Bytes into files in any order: each blob at its offset of the file that `open` gives for it. */
function fileSink(open: OpenPlace, seal?: (blob: BlobState) => Promise<void>): Sink {
  const sync = new BackgroundSync();
  return {
    write: async (blob, position, chunks) => {
      const handle = await open(blob);
      await writeAll(handle, chunks, blob.offset + position);
      const sizeBytes = sumOf(chunks, ({ length }) => length);
      await sync.written(handle, sizeBytes);
    },
    readBack: async function* (blob, [from, to]) {
      yield* readPlace(await open(blob), blob.offset + from, blob.offset + to);
    },
    seal: async (blob) => seal?.(blob),
    end: () => sync.end(),
  };
}

type Filling = Omit<TransferOptions, "sink"> &
  Readonly<{
    journal: Journal;
    open: OpenPlace;
    seal?: (blob: BlobState) => Promise<void>;
  }>;

/** Brings every blob's bytes to its place: what the journal says is there stays, the rest comes. */
async function fillPlaces(filling: Filling): Promise<Transfer> {
  const { blobs, journal, open, seal, ...rest } = filling;
  for (const blob of blobs) await resumeBlob(blob, journal, open);

  const transfer = new Transfer({ ...rest, blobs, journal, sink: fileSink(open, seal) });
  try {
    await transfer.run();
    return transfer;
  } finally {
    for (const blob of blobs) if (blob.unrecordedBytes > 0) journal.record(blob);
  }
}

async function resumeBlob(blob: BlobState, journal: Journal, open: OpenPlace): Promise<void> {
  const { digest, size } = blob.descriptor;
  const ranges = journal.rangesOf(digest);
  if (ranges.length === 0) return;
  const { size: fileBytes } = await (await open(blob)).stat();
  const placeEnd = fileBytes - blob.offset; // a place that has gone holds nothing
  blob.resume(ranges.filter(([, to]) => to <= size && to <= placeEnd));
}

// ------ A tar ------

/** All but the blobs, which come later. */
async function writeFrame(handle: fs.FileHandle, plan: Plan): Promise<void> {
  for (const { lead, bytes, offset } of plan.entries)
    await writeAll(handle, bytes ? [lead, bytes] : [lead], offset - lead.length);
  await writeAll(handle, [plan.trailer], plan.sizeBytes - plan.trailer.length);
  await handle.truncate(plan.sizeBytes);
}

/** Whether a file has all of a plan but the blobs. */
async function hasFrame(handle: fs.FileHandle, plan: Plan): Promise<boolean> {
  const { size } = await handle.stat();
  if (size !== plan.sizeBytes) return false;
  const isThere = async (bytes: Buffer, at: number) =>
    bytes.equals(await readAt(handle, at, bytes.length));
  for (const { lead, bytes, offset } of plan.entries) {
    const frame = bytes ? Buffer.concat([lead, bytes]) : lead;
    if (!(await isThere(frame, offset - lead.length))) return false;
  }
  return isThere(plan.trailer, plan.sizeBytes - plan.trailer.length);
}

/** For a transfer that finds all in its place. */
const NO_SINK: Sink = { write: () => Promise.resolve() };

/**
 * DEST that is to the byte what the plan gives is left alone: who watches it sees no change, and no
 * second copy needs room. Undefined where it has to be written.
 */
async function keepUnchanged(job: PullJob, dest: string): Promise<Transfer | undefined> {
  const { session, plan, observe } = job;
  const opened = await openRegular(dest).catch(ignore);
  if (!opened) return undefined;
  const { handle } = opened;
  try {
    if (!(await hasFrame(handle, plan))) return undefined;
    const transfer = new Transfer({ session, blobs: blobsOf(plan, []), sink: NO_SINK, observe });
    for (const blob of transfer.blobs) {
      if (!(await isIntact({ handle, offset: blob.offset }, blob.descriptor, session.signal)))
        return undefined;
      transfer.keep(blob);
    }
    transfer.markUnchanged();
    return transfer;
  } catch (error) {
    if (session.signal.aborted) stopped(error);
    throw error;
  } finally {
    await handle.close();
  }
}

/**
 * Opens a file that was taken from an earlier run. One that is not our own is removed: its name,
 * not what it leads to.
 */
async function openTaken(file: string, model: BigIntStats): Promise<OpenFile | undefined> {
  const opened = await openRegular(file, O_RDWR).catch(ignore);
  if (opened && isOwn(opened.stats, model)) return opened;
  await opened?.handle.close();
  await fs.unlink(file);
  return undefined;
}

/**
 * A copy of a file in its place, shared block by block where the file system can. Undefined where
 * there is no room.
 */
async function replaceByCopy(file: string): Promise<fs.FileHandle | undefined> {
  const copy = `${file}.copy`;
  try {
    await fs.copyFile(file, copy, constants.COPYFILE_FICLONE | constants.COPYFILE_EXCL);
    await fs.rename(copy, file);
    return (await openRegular(file, O_RDWR))?.handle;
  } catch {
    await removeQuietly(copy);
    await removeQuietly(file);
    return undefined;
  }
}

/**
 * Windows replaces no file that is open or read-only; what is new is looked at by scanners, for a
 * moment.
 */
async function renameOver(from: string, dest: string): Promise<void> {
  const waitsMs = isWindows ? [50, 100, 200, 400, 800] : [];
  for (;;) {
    try {
      return await fs.rename(from, dest);
    } catch (error) {
      if (!isWindows || !["EPERM", "EACCES", "EBUSY"].includes(errorCodeOf(error))) throw error;
      const waitMs = waitsMs.shift();
      const words = "another program has it open, or it is read-only";
      if (waitMs === undefined) fail("DISK", `cannot write ${dest}: ${words}`, { cause: error });
      await delay(waitMs);
    }
  }
}

type TarPlace = Readonly<{ dest: string; plan: Plan; lock: Lock }>;

/**
 * DEST.partial: where a tar's bytes come together until all are verified. The file under that name
 * is this run's alone, though another may come to think that it has the lock.
 */
class PartialTar {
  readonly file: string;
  readonly #dest: string;
  readonly #plan: Plan;
  readonly #lock: Lock;
  readonly #aside: string;
  readonly #journalFile: string;
  #isTaken = false;
  #inPlace: Notes["inPlace"] = new Map();
  #handle: fs.FileHandle | undefined;
  #journal: Journal | undefined;

  private constructor({ dest, plan, lock }: TarPlace) {
    this.file = `${dest}.partial`;
    this.#dest = dest;
    this.#plan = plan;
    this.#lock = lock;
    this.#aside = `${this.file}.${lock.owner.id}`;
    this.#journalFile = `${this.file}.journal`;
  }

  get handle(): fs.FileHandle {
    return this.#handle as fs.FileHandle;
  }
  get journal(): Journal {
    return this.#journal as Journal;
  }

  /** Goes on from what an earlier run left of the plan, or begins anew. */
  static async open(place: TarPlace): Promise<PartialTar> {
    const partial = new PartialTar(place);
    try {
      await partial.#claim();
      await partial.#checkSpace();
      await partial.#begin();
      return partial;
    } catch (error) {
      await partial.close();
      throw error;
    }
  }

  /**
   * Takes what is there to a name of this run's own. What another plan left becomes
   * DEST.partial.old.
   */
  async #claim(): Promise<void> {
    const { model } = this.#lock;
    await this.#lock.assertOurs(this.#dest);
    this.#isTaken = await moveFile(this.file, this.#aside);
    // otherwise it is another's, and put back
    if (this.#isTaken) await this.#lock.assertOurs(this.#dest);
    const found = this.#isTaken ? await openTaken(this.#aside, model) : undefined;
    this.#isTaken = found !== undefined;
    if (!found) return;

    // Read only now: whoever had the file before wrote this before the file was to be seen under
    // its name.
    const notes = await Journal.read(this.#journalFile, model);
    const isOfPlan = notes.planId === this.#plan.id;
    if (isOfPlan && Number(found.stats.size) === this.#plan.sizeBytes)
      return this.#goOnWith(found, notes);
    await found.handle.close();
    await fs.rename(this.#aside, `${this.file}.old`);
    this.#isTaken = false;
  }

  /**
   * Whoever may be alive and has a file open can write to it, whatever name it has: such a file is
   * gone on with as a copy.
   */
  async #goOnWith({ handle, stats }: OpenFile, notes: Notes): Promise<void> {
    const { owner } = notes;
    const isAbandoned =
      !owner ||
      (notes.partial === identityOf(stats) &&
        (notes.isClosed || (await fateOf(owner, this.#lock.owner)) === "dead"));
    if (!isAbandoned) await handle.close();
    this.#handle = isAbandoned ? handle : await replaceByCopy(this.#aside);
    this.#isTaken = this.#handle !== undefined;
    if (this.#isTaken) this.#inPlace = notes.inPlace;
  }

  async #checkSpace(): Promise<void> {
    const { blocks = 0 } = (await this.#handle?.stat()) ?? {};
    const neededBytes = this.#plan.sizeBytes - blocks * BLOCK;
    await checkFreeSpace(this.#dest, path.dirname(this.#dest), neededBytes);
  }

  /**
   * Nothing is written before its name is public: where another has taken it meanwhile, that fails.
   */
  async #begin(): Promise<void> {
    const { mode: destMode = 0o666 } = (await fs.stat(this.#dest).catch(ignore)) ?? {};
    const mode = (destMode & 0o777) | 0o600; // what was private stays so
    this.#handle ??= await createFile(this.#aside, mode);
    const { mode: actualMode } = await this.#handle.stat();
    if ((actualMode & 0o777 & ~mode) !== 0) await fs.chmod(this.#aside, actualMode & mode);

    this.#journal = await Journal.begin(this.#journalFile, this.#lock.owner, {
      planId: this.#plan.id,
      partial: identityOf(await this.#handle.stat({ bigint: true })),
      inPlace: this.#inPlace,
    });
    await this.#lock.assertOurs(this.#dest);
    await replaceFile(this.#aside, this.file);
    await writeFrame(this.#handle, this.#plan);
  }

  /**
   * Gives it DEST's name. It is looked at once more under a name that nobody else has: whoever took
   * the lock over may have put another file in its place. Returns whether that was one step.
   */
  async become(): Promise<boolean> {
    await syncQuietly(this.handle);
    const ours = await this.handle.stat({ bigint: true });
    const isWhole = (found: BigIntStats) =>
      isSameFile(found, ours) && Number(found.size) === this.#plan.sizeBytes;
    const isTaken = await takeFile(this.file, this.#aside, isWhole);
    if (!isTaken || !(await this.#lock.isOurs())) {
      if (isTaken) await putBack(this.#aside, this.file);
      this.#failTaken();
    }

    const isOneStep = await this.#giveName().catch(async (error: unknown) => {
      await putBack(this.#aside, this.file).catch(ignore);
      throw error;
    });
    await this.handle.close();
    await this.journal.remove();
    return isOneStep;
  }

  #failTaken(cause?: unknown): never {
    const words = `${this.file} was replaced or cut, or another imgpull took it over`;
    return fail("DISK", `cannot write ${this.#dest}: ${words}; run it again`, { cause });
  }

  async #giveName(): Promise<boolean> {
    try {
      await renameOver(this.#aside, this.#dest);
      await syncFolder(path.dirname(this.#dest));
      return true;
    } catch (error) {
      if (errorCodeOf(error) === "ENOENT") this.#failTaken(error);
      if (errorCodeOf(error) !== "EBUSY") throw error;
    }
    await this.#writeInPlace();
    await fs.unlink(this.#aside);
    return false;
  }

  /**
   * For a DEST that is mounted by itself. Its first block is written last: what is half-written
   * begins with zeros, and is no tar.
   */
  async #writeInPlace(): Promise<void> {
    const { size, blocks } = await fs.stat(this.#dest);
    await checkFreeSpace(this.#dest, this.#dest, this.#plan.sizeBytes - blocks * BLOCK);
    const dest = await fs.open(this.#dest, O_WRONLY | O_NONBLOCK);
    try {
      await writeAll(dest, [Buffer.alloc(Math.min(BLOCK, size))], 0);
      let at = BLOCK;
      for await (const piece of readPlace(this.handle, at, this.#plan.sizeBytes)) {
        await writeAll(dest, [piece], at);
        at += piece.length;
      }
      await dest.truncate(this.#plan.sizeBytes);
      await syncQuietly(dest);
      await writeAll(dest, [await readAt(this.handle, 0, BLOCK)], 0);
      await syncQuietly(dest);
    } finally {
      await dest.close();
    }
  }

  /**
   * After a failure. Returns whether `keptBytes` of it are still there, for the next run to go on
   * from.
   */
  async close(keptBytes = sumOf(this.#inPlace.values(), lengthOf)): Promise<boolean> {
    const ours = await this.#handle?.stat({ bigint: true });
    await this.#handle?.close();
    if (!this.#journal) {
      // Its name is not public yet.
      if (this.#isTaken) await putBack(this.#aside, this.file);
      else await removeQuietly(this.#aside);
      return this.#isTaken;
    }

    const isThere = ours !== undefined && isSameFile(await statAt(this.file), ours);
    // nothing goes on from one that was cut
    const isWhole = Number(ours?.size) === this.#plan.sizeBytes;
    if (isThere && isWhole && keptBytes > 0) {
      await this.#journal.close();
      return true;
    }
    if (isThere) await removeQuietly(this.file);
    await removeQuietly(this.#aside);
    await this.#journal.remove();
    return false;
  }
}

/**
 * The tars from which a pull to `dest` can copy: what another plan left (the tag has moved on), and
 * DEST itself.
 */
async function sourcesBeside(dest: string, { model }: Lock): Promise<OpenTar[]> {
  const old = `${dest}.partial.old`;
  const stats = await statAt(old);
  return openAtHand(stats && isOwn(stats, model) ? [old, dest] : [dest]);
}

async function openAtHand(files: readonly string[]): Promise<OpenTar[]> {
  const tars = await Promise.all(files.map((file) => openTarFile(file).catch(ignore)));
  return tars.filter((tar) => tar !== undefined);
}

async function closeTars(tars: Tars): Promise<void> {
  for (const { handle } of tars) await handle.close();
}

/** The plan into `dest` by way of `dest`.partial. */
async function fillTar(job: PullJob, dest: string, lock: Lock): Promise<Transfer> {
  const { session, plan, tars, observe } = job;
  const partial = await PartialTar.open({ dest, plan, lock });
  const sources = [...tars, ...(await sourcesBeside(dest, lock))];
  const blobs = blobsOf(plan, sources);
  try {
    const { journal, handle } = partial;
    const open = async () => handle;
    const transfer = await fillPlaces({ session, blobs, observe, journal, open });
    await closeTars(sources); // one of them may be DEST, and Windows renames onto no open file
    if (!(await partial.become()))
      session.warn(`${dest} is mounted by itself: it was written in place, which was not one step`);
    return transfer;
  } catch (error) {
    const keptBytes = sumOf(blobs, ({ inPlace }) => lengthOf(inPlace));
    const words = `${partial.file} keeps ${formatBytes(keptBytes)}: the same command goes on from there`;
    if (await partial.close(keptBytes)) session.warn(words);
    throw error;
  } finally {
    await closeTars(sources);
  }
}

async function pullToTar(job: PullJob, dest: string): Promise<Transfer> {
  const partial = `${dest}.partial`;
  const journalFile = `${partial}.journal`;
  const lock = await Lock.acquire(`${partial}.lock`, dest);
  try {
    const deadId = await findDeadId(journalFile, lock);
    const isOurs = (name: string) => name === path.basename(partial);
    await fenceOff({ folder: path.dirname(dest), isOurs, deadId, lock });

    const unchanged = await keepUnchanged(job, dest);
    const transfer = unchanged ?? (await fillTar(job, dest, lock));
    const leftovers = unchanged ? [partial, journalFile] : [];
    for (const file of [...leftovers, `${partial}.old`]) await removeQuietly(file);
    return transfer;
  } finally {
    await lock.release();
  }
}

// ------ A folder ------

/**
 * The files of blobs, each of its own. While one is written to, its name has its run's id
 * (`FILE.partial.ID`), which nobody takes from a run that may be alive; afterwards it is
 * `FILE.partial`, and once verified FILE.
 */
class BlobFiles {
  readonly #nameOf: (blob: BlobState) => string;
  readonly #lock: Lock;
  readonly #files = new Map<BlobState, Promise<fs.FileHandle>>();

  constructor(nameOf: (blob: BlobState) => string, lock: Lock) {
    this.#nameOf = nameOf;
    this.#lock = lock;
  }

  #asideOf(blob: BlobState): string {
    return `${this.#nameOf(blob)}.partial.${this.#lock.owner.id}`;
  }

  open = (blob: BlobState): Promise<fs.FileHandle> => {
    const file = this.#files.get(blob) ?? this.#open(blob);
    this.#files.set(blob, file);
    return file;
  };

  async #open(blob: BlobState): Promise<fs.FileHandle> {
    const aside = this.#asideOf(blob);
    const isTaken = await moveFile(`${this.#nameOf(blob)}.partial`, aside);
    const found = isTaken ? await openTaken(aside, this.#lock.model) : undefined;
    return found?.handle ?? createFile(aside);
  }

  seal = async (blob: BlobState): Promise<void> => {
    const name = this.#nameOf(blob);
    const aside = this.#asideOf(blob);
    const handle = await this.open(blob);
    await handle.truncate(blob.descriptor.size);
    await syncQuietly(handle);
    const ours = await handle.stat({ bigint: true });
    this.#files.delete(blob);
    await handle.close();
    if (!isSameFile(await statAt(aside), ours)) fail("DISK", `${aside} was replaced; run it again`);
    await replaceFile(aside, name);
  };

  /** Whether its file is there already, and right. */
  async has(blob: BlobState, signal: AbortSignal): Promise<boolean> {
    const opened = await openRegular(this.#nameOf(blob)).catch(ignore);
    if (!opened) return false;
    const { handle, stats } = opened;
    try {
      const isWhole = Number(stats.size) === blob.descriptor.size;
      return isWhole && (await isIntact({ handle, offset: 0 }, blob.descriptor, signal));
    } finally {
      await handle.close();
    }
  }

  /** What is not whole is left for the next run, unless there is nothing of it. */
  async close(): Promise<void> {
    for (const [blob, file] of this.#files) {
      const handle = await file.catch(ignore);
      await handle?.close();
      const aside = this.#asideOf(blob);
      if (blob.doneBytes === 0) await removeQuietly(aside);
      else await fs.rename(aside, `${this.#nameOf(blob)}.partial`).catch(ignore);
    }
  }
}

type FolderJob = Readonly<{
  session: Session;
  blobs: readonly BlobState[];
  folder: string;
  /** A blob's file, under the folder. */
  nameOf: (digest: string) => string;
  observe: Observer;
  /** Makes what folders the files need below it; gives those, the deepest first. */
  makeFolders?: () => Promise<string[]>;
  /**
   * All blobs are there, and the lock is still held. Returns whether anything had to be written.
   */
  seal?: (lock: Lock) => Promise<boolean>;
}>;

/**
 * Each blob as a file of its own under `folder`; those that are there already are verified and
 * kept.
 */
async function pullToFolder(job: FolderJob): Promise<Transfer> {
  const { blobs, folder, nameOf } = job;
  const base = path.join(folder, ".imgpull.partial");
  const isBlob = (name: string) => /^[0-9a-f]{64,128}\.partial$/.test(name);
  const isDocument = (name: string) => FOLDER_PARTIALS.includes(name);
  const isOurs = (name: string) => isBlob(name) || isDocument(name);
  const blobFolders = blobs.map(({ descriptor }) =>
    path.join(folder, path.dirname(nameOf(descriptor.digest))),
  );
  const folders = [...new Set([folder, ...blobFolders])];
  const lock = await Lock.acquire(`${base}.lock`, folder);
  let made: string[] = [];
  try {
    made = (await job.makeFolders?.()) ?? [];
    const deadId = await findDeadId(`${base}.journal`, lock);
    for (const place of folders) await fenceOff({ folder: place, isOurs, deadId, lock });

    const transfer = await fillFolder(job, lock);
    const isWritten = (await job.seal?.(lock)) ?? false;
    if (transfer.blobs.length === 0 && !isWritten) transfer.markUnchanged();

    // What a tag had that has moved on would stay for ever.
    await removeQuietly(`${base}.journal`);
    for (const place of folders)
      for (const name of await listOptional(place))
        if (isOurs(name)) await removeQuietly(path.join(place, name));
    return transfer;
  } catch (error) {
    // Without a part of a blob, the journal has nothing to tell the next run.
    const left = (await Promise.all(folders.map(listOptional))).flat();
    if (!left.some(isOurs) && (await lock.isOurs())) {
      await removeQuietly(`${base}.journal`);
      await removeEmpty(made);
    }
    throw error;
  } finally {
    await lock.release();
  }
}

/** What lies in a folder beside its blobs, while it is written. */
const FOLDER_PARTIALS = [".imgpull.partial", "index.json.partial", "oci-layout.partial"];

async function fillFolder(job: FolderJob, lock: Lock): Promise<Transfer> {
  const { session, blobs, folder, nameOf, observe } = job;
  const pathOf = ({ descriptor }: BlobState) => path.join(folder, nameOf(descriptor.digest));
  const files = new BlobFiles(pathOf, lock);
  const missing: BlobState[] = [];
  for (const blob of blobs) if (!(await files.has(blob, session.signal))) missing.push(blob);
  await checkFreeSpace(folder, folder, sizeOf(missing));

  const journalFile = path.join(folder, ".imgpull.partial.journal");
  const { inPlace } = await Journal.read(journalFile, lock.model);
  const notes = { planId: "folder", partial: "", inPlace };
  const journal = await Journal.begin(journalFile, lock.owner, notes);
  try {
    const { open, seal } = files;
    const keptBytes = sizeOf(blobs) - sizeOf(missing);
    const filling = { session, blobs: missing, keptBytes, observe, journal, open, seal };
    return await fillPlaces(filling);
  } finally {
    await files.close();
    await journal.close();
  }
}

/**
 * The index of a layout with our images in it, beside what it named before under other names. One
 * that has ours already, in this order, is given back as it is.
 */
function mergeIndex(
  before: Record<string, unknown>,
  ours: { manifests: Descriptor[] },
): Record<string, unknown> {
  // What has no name is known by its digest: it is what refers to an image.
  const nameOf = ({ annotations, digest }: Descriptor) => annotations?.[NAME_KEYS[1]] ?? digest;
  const names = new Set(ours.manifests.map(nameOf));
  const listed = Array.isArray(before.manifests) ? (before.manifests as Descriptor[]) : [];
  const isOther = (entry: Descriptor) => !names.has(nameOf(entry));
  const merged = { ...before, ...ours, manifests: [...listed.filter(isOther), ...ours.manifests] };

  const there = { ...before, manifests: listed.filter((entry) => !isOther(entry)) };
  const wanted = { ...merged, manifests: ours.manifests };
  return encodeJson(there).equals(encodeJson(wanted)) ? before : merged;
}

/** The bytes of a file of a layout; undefined where there is none. */
async function readLayoutFile(file: string): Promise<Buffer | undefined> {
  const opened = await openRegular(file);
  if (!opened) {
    if (await statAt(file)) fail("DISK", `${file} is in the way: it is not a regular file`);
    return undefined;
  }
  return readAndClose(opened);
}

async function readLayoutIndex(folder: string): Promise<Record<string, unknown>> {
  const index = parseJson((await readLayoutFile(path.join(folder, "index.json"))) ?? "{}");
  if (isRecord(index)) return index;
  return fail("DISK", `${folder} holds an index.json that is not a JSON object`);
}

/**
 * Makes the folders of a layout, and gives those that were not there, the deepest first. A link
 * that leads out of it would have us write there.
 */
async function makeLayoutFolders(folder: string, names: Iterable<string>): Promise<string[]> {
  const made: string[] = [];
  const root = await fs.realpath(folder);
  const needed = new Set<string>();
  for (const name of names)
    for (let at = parentOf(name); at !== ""; at = parentOf(at)) needed.add(at);

  for (const name of [...needed].sort()) {
    const place = path.join(folder, name);
    try {
      await fs.mkdir(place);
      made.unshift(place);
    } catch (error) {
      if (errorCodeOf(error) !== "EEXIST") throw error;
    }
    const inside = path.relative(root, await fs.realpath(place));
    if (inside.startsWith("..") || path.isAbsolute(inside))
      fail("DISK", `${place} is a link that leads out of ${folder}`);
  }
  return made;
}

/** A document of a layout, in one step. One that is there with the same bytes is left alone. */
async function writeLayoutFile(file: string, bytes: Buffer, lock: Lock): Promise<boolean> {
  const before = await openRegular(file).catch(ignore);
  const there = before && (await readAndClose(before));
  if (there?.equals(bytes)) return false;

  const aside = `${file}.partial.${lock.owner.id}`;
  const handle = await createFile(aside);
  try {
    await writeAll(handle, [bytes], 0);
    await syncQuietly(handle);
    await lock.assertOurs(file);
    await replaceFile(aside, file);
    return true;
  } catch (error) {
    await removeQuietly(aside);
    throw error;
  } finally {
    await handle.close();
  }
}

/**
 * The documents of a layout whose blobs are there, the index in the end. Returns whether any had to
 * be written.
 */
async function sealLayout(
  folder: string,
  documents: ReadonlyMap<string, Buffer>,
  lock: Lock,
): Promise<boolean> {
  const before = await readLayoutIndex(folder); // under the lock: another run may have added to it
  const ours = parseJson(documents.get("index.json") ?? "") as { manifests: Descriptor[] };
  let isWritten = false;
  for (const [name, bytes] of documents) {
    if (name === "index.json" || name === "manifest.json") continue;
    if (await writeLayoutFile(path.join(folder, name), bytes, lock)) isWritten = true;
  }

  const merged = mergeIndex(before, ours);
  if (merged !== before) {
    await writeLayoutFile(path.join(folder, "index.json"), encodeJson(merged), lock);
    isWritten = true;
  }
  if (isWritten) await syncFolder(folder);
  return isWritten;
}

/**
 * An OCI image layout: blobs first, then the index that names them, in one step and beside what it
 * named before.
 */
async function pullToLayout(job: PullJob, folder: string): Promise<Transfer> {
  const { session, plan, tars, observe } = job;
  const documents = new Map<string, Buffer>();
  for (const { name, bytes } of plan.entries) if (bytes) documents.set(name, bytes);
  const names = plan.entries.map(({ name }) => name);
  const makeFolders = () => makeLayoutFolders(folder, names);
  const seal = (lock: Lock) => sealLayout(folder, documents, lock);
  const blobs = blobsOf(plan, tars, true);
  return inFolder(folder, async () => {
    await readLayoutIndex(folder); // one that we cannot add to is told before anything is fetched
    const job = { session, blobs, folder, nameOf: blobPath, observe, makeFolders, seal };
    return pullToFolder(job).catch(tellOfInodes(folder));
  });
}

// ------ A stream ------

/**
 * What came before its turn, up to a bound: bytes are put in at any place of the tar and taken out
 * in order.
 */
class ReadAhead {
  readonly #early = new Map<number, Buffer>(); // by place in the tar
  readonly #change = new Change();
  #cursor = 0;

  /** How far the line may be. */
  get horizon(): number {
    return this.#cursor + TUNING.streamWindowBytes;
  }

  /** Waits while the place is too far ahead of the reader. */
  async put(place: number, bytes: Buffer, signal: AbortSignal): Promise<void> {
    const isNear = () => place < this.horizon;
    await this.#change.until(isNear, signal);
    this.#early.set(place, bytes);
    this.#change.announce();
  }

  /** Waits for what comes at a place; whatever was before it is behind the reader. */
  async take(place: number, signal: AbortSignal): Promise<Buffer> {
    this.moveTo(place);
    await this.#change.until(() => this.#early.has(place), signal);
    const bytes = this.#early.get(place) as Buffer;
    this.#early.delete(place);
    return bytes;
  }

  moveTo(place: number): void {
    this.#cursor = place;
    this.#change.announce();
  }
}

/** What is sent cannot be taken back: a tar at hand is hashed before a byte of it is used. */
async function dropLyingSources(blobs: readonly BlobState[]): Promise<void> {
  for (const blob of blobs)
    while (blob.source && !(await isIntact(blob.source, blob.descriptor))) blob.dropSource();
}

/** The tar in order; the bytes of blobs are verified as they go by. */
async function* tarInOrder(
  plan: Plan,
  { blobs, signal }: Transfer,
  readAhead: ReadAhead,
): AsyncGenerator<Buffer> {
  const byOffset = new Map(blobs.map((blob) => [blob.offset, blob]));
  for (const { lead, bytes, offset, sizeBytes } of plan.entries) {
    yield lead;
    if (bytes) yield bytes;
    const blob = bytes ? undefined : byOffset.get(offset);
    if (!blob) continue;

    for (let place = offset; place < offset + sizeBytes; ) {
      const batch = await readAhead.take(place, signal);
      blob.hashInOrder(place - offset, batch);
      yield batch;
      place += batch.length;
      readAhead.moveTo(place);
    }
    if (!blob.verify())
      fail("DIGEST_MISMATCH", `${blob.descriptor.digest}: the bytes have another digest`);
  }
  yield plan.trailer;
}

/** The plan in order onto a stream. The trailer follows only if all was right. */
async function pullToStream(job: PullJob, output: NodeJS.WritableStream): Promise<Transfer> {
  const { session, plan, tars, observe } = job;
  const readAhead = new ReadAhead();
  const sink: Sink = {
    horizon: () => readAhead.horizon,
    write: ({ offset }, position, chunks) =>
      readAhead.put(offset + position, Buffer.concat(chunks), transfer.signal),
  };
  const blobs = blobsOf(plan, tars);
  const transfer = new Transfer({ session, blobs, sink, observe });
  await dropLyingSources(blobs);

  const { signal } = transfer;
  const pieces = tarInOrder(plan, transfer, readAhead);
  const source = Readable.from(pieces, { objectMode: true, highWaterMark: 1 });
  const sending = pipeline(source, output, { end: false, signal });
  const failed = (error: unknown) =>
    transfer.stop(signal.aborted ? connectionError(error, "the stream") : error);
  settled(await Promise.allSettled([transfer.run().catch(failed), sending.catch(failed)]));
  return transfer;
}

/**
 * A pipe, once somebody reads it: asked again and again, for the system would wait where no Ctrl-C
 * reaches.
 */
async function openOutputPipe(file: string, { signal, warn }: Session): Promise<Writable> {
  for (let waitedMs = 0; ; waitedMs += TUNING.readerPollMs) {
    if (waitedMs === TUNING.readerNewsMs) warn(`${file}: waiting for somebody to read it`);
    try {
      const descriptor = openSync(file, O_WRONLY | O_NONBLOCK);
      return new net.Socket({ fd: descriptor, readable: false, writable: true });
    } catch (error) {
      if (errorCodeOf(error) !== "ENXIO") throw error; // no reader yet
    }
    await delay(TUNING.readerPollMs, undefined, { signal });
  }
}

function openDevice(file: string): Writable {
  const descriptor = openSync(file, O_WRONLY | O_NONBLOCK);
  if (!load("node:tty").isatty(descriptor)) return createWriteStream("", { fd: descriptor });
  closeSync(descriptor);
  return fail("BAD_OPTION", `the tar is not written to a terminal (${file})`);
}

/** Onto a pipe or a device, which whoever reads it sees the end of. */
async function pullToDevice(job: PullJob, file: string): Promise<Transfer> {
  const { signal } = job.session;
  const isPipe = (await fs.stat(file)).isFIFO();
  const opening = isPipe ? openOutputPipe(file, job.session) : Promise.resolve(openDevice(file));
  const output = await opening.catch((error: unknown) => {
    if (signal.aborted) stopped(error);
    throw error;
  });
  try {
    const transfer = await pullToStream(job, output);
    await finished(output.end());
    return transfer;
  } finally {
    output.destroy();
  }
}

// ====== 13. Proof ======
// What refers to an image (signatures, attestations, SBOMs), and whether a given key has signed it.
// Invariant: a list's word is no proof. What a referrer is stands in its own manifest, and what it
// says of an image counts once one of the keys has signed just that.

// ------ Keys ------

/**
 * A public key, and the hashes that a signature by it may have been made with; Ed25519 has its own
 * within.
 */
interface SignerKey {
  readonly publicKey: KeyObject;
  readonly hashes: readonly (string | null)[];
}

/**
 * What cosign signs with, by curve. P-384 and P-521 had SHA-256 in cosign 1 and 2, sigstore-go
 * takes both.
 */
const HASHES_OF_CURVE = new Map([
  ["prime256v1", ["sha256"]],
  ["secp384r1", ["sha384", "sha256"]],
  ["secp521r1", ["sha512", "sha256"]],
]);

/**
 * Other things that come in PEM, each with what to do instead. Nothing of the text is ever quoted.
 */
const NOT_PUBLIC_KEYS: readonly (readonly [label: RegExp, words: string])[] = [
  [/PRIVATE KEY/, "a private key, which does not belong here: give the public one (cosign.pub)"],
  [
    /CERTIFICATE/,
    "a certificate, and chains are not checked here: give its key (openssl x509 -pubkey -noout)",
  ],
  [/PGP/, "a PGP key, which cosign does not sign with"],
];

/** Reads one PEM public key. `name` is what the user called it. */
function parsePublicKey(pem: string, name: string): SignerKey {
  const refuse = (reason: string): never =>
    fail("BAD_OPTION", `the key ${printable(name)} is ${reason}`);
  const labels = Array.from(
    pem.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----/g),
    ([, label = ""]) => label,
  );

  const other = NOT_PUBLIC_KEYS.find(([pattern]) => labels.some((label) => pattern.test(label)));
  if (other) return refuse(other[1]);
  if (labels.length > 1) return refuse("more than one key: give each by itself");
  // createPublicKey would take a private key or a certificate too, so the label is looked at first.
  if (!/^(RSA )?PUBLIC KEY$/.test(labels[0] ?? ""))
    return refuse("no PEM public key (-----BEGIN PUBLIC KEY-----)");

  const publicKey = decodePublicKey(pem);
  if (!publicKey) return refuse("damaged: its PEM does not hold a public key");
  return { publicKey, hashes: hashesOf(publicKey, refuse) };
}

function decodePublicKey(pem: string): KeyObject | undefined {
  try {
    return load("node:crypto").createPublicKey(pem);
  } catch {
    return undefined; // OpenSSL's words say nothing to a user
  }
}

function hashesOf(
  { asymmetricKeyType: type, asymmetricKeyDetails: details = {} }: KeyObject,
  refuse: (reason: string) => never,
): readonly (string | null)[] {
  if (type === "ed25519") return [null];
  if (type === "rsa" && (details.modulusLength ?? 0) < 2048)
    return refuse("an RSA key of less than 2048 bits, which anyone may have broken");
  if (type === "rsa") return ["sha256"];

  const hashes = type === "ec" ? HASHES_OF_CURVE.get(details.namedCurve ?? "") : undefined;
  if (hashes) return hashes;
  const kind = printable(details.namedCurve ?? String(type), 40);
  return refuse(`a key of the kind ${kind}: cosign's are ECDSA P-256, P-384, P-521, RSA, Ed25519`);
}

const isSignedBy = (keys: readonly SignerKey[], message: Buffer, signature: Buffer): boolean =>
  keys.some(({ publicKey, hashes }) =>
    hashes.some((hash) => load("node:crypto").verify(hash, message, publicKey, signature)),
  );

// ------ Signatures ------

/** The digests that a key vouches for by a signature; or why it is none by these keys. */
type Testimony = Readonly<{ subjects: readonly string[] }> | "keyless" | "other key" | "unreadable";

const SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json";
const BUNDLE = "application/vnd.dev.sigstore.bundle";
const BUNDLE_VERSIONS = [`${BUNDLE}.v0.3+json`, `${BUNDLE}+json;version=0.3`];
const IN_TOTO = "application/vnd.in-toto+json";

const isSignature = ({ mediaType }: Descriptor): boolean =>
  mediaType === SIMPLE_SIGNING || mediaType.startsWith(BUNDLE);

function checkSignatureCount({ length }: readonly Descriptor[], where: string): void {
  const { signatures } = LIMITS;
  if (length > signatures) fail("TOO_LARGE", `${where}: more than ${signatures} signatures`);
}

/** What a layer that may be a signature says. A key is asked first, and then what it has signed. */
function readSignature(
  { mediaType, annotations = {} }: Descriptor,
  bytes: Buffer,
  keys: readonly SignerKey[],
): Testimony {
  const isPayload = mediaType === SIMPLE_SIGNING;
  return isPayload ? readPayload(annotations, bytes, keys) : readBundle(bytes, keys);
}

/**
 * cosign's first form: the layer's bytes are the payload, and an annotation of the layer is the
 * signature.
 */
function readPayload(
  annotations: Readonly<Record<string, string>>,
  payload: Buffer,
  keys: readonly SignerKey[],
): Testimony {
  const signature = fromBase64(annotations["dev.cosignproject.cosign/signature"]);
  const isKeyless = "dev.sigstore.cosign/certificate" in annotations;
  if (!isSignedBy(keys, payload, signature)) return isKeyless ? "keyless" : "other key";

  const critical = recordIn(parseJson(payload), "critical");
  if (critical.type !== "cosign container image signature") return "unreadable";
  const subject = recordIn(critical, "image")["docker-manifest-digest"];
  return { subjects: isDigest(subject) ? [subject] : [] };
}

/**
 * cosign's second form: a Sigstore bundle, in it a DSSE envelope, in it an in-toto statement of any
 * predicate.
 */
function readBundle(bytes: Buffer, keys: readonly SignerKey[]): Testimony {
  const bundle = recordIn(parseShallowJson(bytes, LIMITS.bundleJsonValues));
  const { payloadType, payload, signatures } = recordIn(bundle, "dsseEnvelope");
  // A bundle has exactly one signature, though an envelope may have more (sigstore-go refuses such
  // a bundle too).
  const isEnvelope =
    payloadType === IN_TOTO && Array.isArray(signatures) && signatures.length === 1;
  if (!BUNDLE_VERSIONS.includes(String(bundle.mediaType)) || !isEnvelope) return "unreadable";

  const statement = fromBase64(payload);
  const message = encodePreAuthentication(IN_TOTO, statement);
  const signature = fromBase64(recordIn(signatures[0]).sig);
  const { certificate, x509CertificateChain } = recordIn(bundle, "verificationMaterial");
  const isKeyless = (certificate ?? x509CertificateChain) !== undefined;
  if (!isSignedBy(keys, message, signature)) return isKeyless ? "keyless" : "other key";

  return readStatement(statement);
}

/** What a DSSE signature is over (its specification, "Pre-Authentication Encoding"). */
function encodePreAuthentication(payloadType: string, payload: Buffer): Buffer {
  const head = `DSSEv1 ${Buffer.byteLength(payloadType)} ${payloadType} ${payload.length} `;
  return Buffer.concat([Buffer.from(head, "utf8"), payload]);
}

/** The subjects of an in-toto statement that a key has vouched for. */
function readStatement(bytes: Buffer): Testimony {
  const { _type: type, subject: subjects } = recordIn(parseJson(bytes));
  const isStatement = typeof type === "string" && type.startsWith("https://in-toto.io/Statement/");
  if (!isStatement || !Array.isArray(subjects)) return "unreadable";

  const digests = subjects.flatMap((subject) =>
    Object.entries(recordIn(subject, "digest")).map(([algorithm, hex]) => `${algorithm}:${hex}`),
  );
  return { subjects: digests.filter(isDigest) };
}

/** What a signature is worth for the digests that would do. */
type Verdict = "good" | "other subject" | Exclude<Testimony, object>;

function judge(testimony: Testimony, digests: readonly string[]): Verdict {
  if (typeof testimony === "string") return testimony;
  const isNamed = testimony.subjects.some((subject) => digests.includes(subject));
  return isNamed ? "good" : "other subject";
}

/** The object at a path of keys, or an empty one: what is not there has no fields. */
function recordIn(value: unknown, ...keys: readonly string[]): Record<string, unknown> {
  let record = isRecord(value) ? value : {};
  for (const key of keys) {
    const inner = Object.hasOwn(record, key) ? record[key] : undefined;
    record = isRecord(inner) ? inner : {};
  }
  return record;
}

const fromBase64 = (text: unknown): Buffer =>
  Buffer.from(typeof text === "string" ? text : "", "base64");

// ------ Finding what refers to an image ------

/**
 * cosign's tags for what belongs to `sha256-HEX`, and how `cosign save` marks the first two in
 * index.json.
 */
const COSIGN_TAGS: readonly Readonly<{ suffix: string; kind?: string }>[] = [
  { suffix: ".sig", kind: "dev.cosignproject.cosign/sigs" },
  { suffix: ".att", kind: "dev.cosignproject.cosign/atts" },
  { suffix: ".sbom" },
];

type Collected = Awaited<ReturnType<typeof collectAll>>;

/**
 * The tag that stands for the referrers endpoint (distribution specification, "Referrers Tag
 * Schema").
 */
const referrersTag = (digest: string): string =>
  `${algorithmOf(digest)}-${hexOf(digest).slice(0, 64)}`;

/**
 * Where something that may refer to `subject` is: by a digest that a list names, or by a tag of
 * cosign's.
 */
type ReferrerPlace = Readonly<{ subject: string; digest?: string; tag?: string; kind?: string }>;

/**
 * Looks for what refers to manifests of one repository, and to that in turn; it alone counts what
 * was found.
 */
class ReferrerSearch {
  readonly #session: Session;
  readonly #registry: Registry;
  readonly #where: string;
  readonly #subjects: readonly string[];
  readonly #found = new Map<string, Companion>(); // by digest

  /** `where` is what the image is called in messages. */
  constructor(session: Session, registry: Registry, where: string, subjects: readonly string[]) {
    this.#session = session;
    this.#registry = registry;
    this.#where = where;
    this.#subjects = subjects;
  }

  /** Sorted by digest: lists have no order, and the same bytes are promised. */
  async run(): Promise<Companion[]> {
    const { concurrency } = this.#session.settings;
    let level = this.#subjects;

    for (let depth = 0; depth < LIMITS.referrerDepth && level.length > 0; depth += 1) {
      const lists = await mapConcurrently(level, concurrency, (each) => this.#placesOf(each));
      const places = lists.flat();
      const referrers = await mapConcurrently(places, concurrency, (each) => this.#fetch(each));
      const fresh = referrers.filter((each) => each !== undefined && this.#add(each));
      level = fresh.map((each) => (each as Companion).top.digest);
    }
    return [...this.#found.values()].sort(byDigest);
  }

  /** False for what is known already, as a referrer or as one of the subjects. */
  #add(referrer: Companion): boolean {
    const { digest } = referrer.top;
    if (this.#found.has(digest) || this.#subjects.includes(digest)) return false;

    this.#found.set(digest, referrer);
    this.#checkCount(this.#found.size);
    return true;
  }

  #checkCount(count: number): void {
    const { referrers } = LIMITS;
    if (count > referrers) fail("TOO_LARGE", `${this.#where}: more than ${referrers} referrers`);
  }

  /**
   * What the endpoint lists, or else the tag that stands for it; and cosign's tags, which are in no
   * list.
   */
  async #placesOf(subject: string): Promise<ReferrerPlace[]> {
    const lists = (await this.#registry.referrers(subject)) ?? (await this.#taggedList(subject));
    const entries = lists.flatMap((bytes) => listIn(parseJson(bytes), "manifests"));
    const where = `${this.#where}: its list of referrers`;
    const digests = new Set(entries.map((entry) => parseDescriptor(entry, where).digest));
    this.#checkCount(digests.size);

    const listed = Array.from(digests, (digest) => ({ subject, digest }));
    // An algorithm of more than 64 digits gives a tag that is too long to be one.
    const isTaggable = algorithmOf(subject) === "sha256";
    const tagged = (isTaggable ? COSIGN_TAGS : []).map(({ suffix, ...kind }) => {
      const tag = `${referrersTag(subject)}${suffix}`;
      return { subject, tag, ...kind };
    });
    return [...tagged, ...listed];
  }

  /** No such tag, or one that is no index: nothing refers to it. */
  async #taggedList(subject: string): Promise<Buffer[]> {
    const list = await this.#registry.proof(referrersTag(subject));
    return list ? [list.bytes] : [];
  }

  async #fetch({ subject, digest, tag, kind }: ReferrerPlace): Promise<Companion | undefined> {
    const isListed = digest !== undefined;
    const top = isListed
      ? await orMissing(this.#registry.manifest(digest))
      : await this.#registry.proof(tag as string);
    // What a list says of it is not asked: its own manifest has the subject.
    const fault = top ? "refers to something else" : "is not there";
    if (isListed && (!top || subjectOf(top) !== subject)) {
      this.#session.warn(`${this.#where}: ${digest} is listed as a referrer, and ${fault}`);
      return undefined;
    }
    const collected = top && (await this.#collect(top));
    if (!top || !collected) return undefined;

    const { manifests, contents } = collected;
    const artifactType = artifactTypeOf(top);
    const registry = this.#registry;
    return { registry, top, manifests, contents, subject, ...dropEmpty({ artifactType, kind }) };
  }

  /** All below a referrer; nothing of one that is no manifest, or not whole. */
  async #collect(top: FetchedManifest): Promise<Collected | undefined> {
    const readChild = childrenOf(this.#registry, this.#where);
    try {
      return await collectAll(readChild, 1, this.#where, top);
    } catch (error) {
      const { code, message } = error as ImgpullError;
      if (!["PROTOCOL", "UNSUPPORTED", "NOT_FOUND"].includes(code)) throw error;
      this.#session.warn(`left out the referrer ${top.digest}: ${message}`);
      return undefined;
    }
  }
}

const byDigest = (left: Companion, right: Companion): number =>
  left.top.digest < right.top.digest ? -1 : 1;

/** Undefined for what the registry says that it does not have. */
async function orMissing<T>(asked: Promise<T>): Promise<T | undefined> {
  try {
    return await asked;
  } catch (error) {
    if (error instanceof ImgpullError && error.code === "NOT_FOUND") return undefined;
    throw error;
  }
}

function listIn(value: unknown, key: string): unknown[] {
  const list = recordIn(value)[key];
  return Array.isArray(list) ? list : [];
}

const subjectOf = ({ bytes }: FetchedManifest): unknown =>
  recordIn(parseJson(bytes), "subject").digest;

/**
 * A manifest's own word: its artifactType, or else its config's media type, unless that is any
 * image's.
 */
function artifactTypeOf({ bytes }: FetchedManifest): string {
  const { artifactType, config } = recordIn(parseJson(bytes));
  if (typeof artifactType === "string" && artifactType !== "") return artifactType;
  const { mediaType } = recordIn(config);
  return typeof mediaType === "string" && !CONFIG_TYPES.includes(mediaType) ? mediaType : "";
}

// ------ Proof of an image ------

/**
 * The image with all that refers to it. SIGNATURE where there are signers, and none of them has
 * signed it.
 */
async function addProof(
  session: Session,
  resolved: ResolvedImage,
  signers: readonly SignerKey[],
): Promise<ResolvedImage> {
  const { reference, registry, asked, top, manifests } = resolved;
  const where = formatReference(reference);
  const subjects = [...new Set([asked, ...manifests].map(({ digest }) => digest))];
  const referrers = await new ReferrerSearch(session, registry, where, subjects).run();
  const digests = [...new Set([asked.digest, top.digest])];
  if (signers.length > 0)
    await requireSignature(session, { registry, where, digests }, referrers, signers);

  const hasIndex = asked !== top && isReferredTo(asked, referrers);
  const isIndexMarked =
    hasIndex && (hasSignature(asked, referrers) || !hasSignature(top, referrers));
  const marked = isIndexMarked ? asked : top;
  const kind = cosignKind(marked, referrers);
  // cosign takes the first entry of each kind for the one image: signatures of others are not
  // marked.
  const companions = referrers.map((referrer): Companion => {
    const { kind: _kind, ...plain } = referrer;
    return plain.subject === marked.digest ? referrer : plain;
  });
  const image = { ...resolved, ...dropEmpty({ kind: isIndexMarked ? undefined : kind }) };
  if (!hasIndex) return { ...image, companions };

  // The far side goes from the signature to the index, and from there to the image.
  const above = await pathTo(top.digest, asked, childrenOf(registry, where), where);
  const indexes = (above ?? []).map((index): Companion => {
    const mark = dropEmpty({ kind: isIndexMarked && index === asked ? kind : undefined });
    return {
      registry,
      top: index,
      manifests: [index],
      contents: [],
      subject: top.digest,
      isIndex: true,
      ...mark,
    };
  });
  return { ...image, companions: [...indexes, ...companions] };
}

/**
 * What the plan of some images takes for their companions, each once: indexes first, then by
 * digest.
 */
function planExtras(images: readonly ResolvedImage[]): Required<PlanExtras> {
  const named = new Set(images.map(({ top }) => top.digest));
  const all = images.flatMap(({ companions = [] }) => companions);
  const unique = new Map(all.map((companion) => [companion.top.digest, companion]));
  const companions = [...unique.values()]
    .filter(({ top }) => !named.has(top.digest))
    .sort(
      (left, right) =>
        Number(isReferrer(left)) - Number(isReferrer(right)) || byDigest(left, right),
    );

  return {
    indexEntries: companions.map(companionEntry),
    documents: companions.flatMap(({ manifests }) => manifests),
    blobs: companions.flatMap(({ registry, contents }) =>
      contents
        .flatMap(({ manifest }) => [manifest.config, ...manifest.layers])
        .map((descriptor) => ({ descriptor, registry })),
    ),
  };
}

const isReferrer = ({ isIndex = false }: Companion): boolean => !isIndex;

/** Where docker 29.1 and containerd 2.2 read what an entry of index.json refers to. */
const SUBJECT_KEY = "io.containerd.manifest.subject";

/**
 * As BuildKit's attestations have it: ctr leaves out what does not match, and does not miss an
 * index's other images.
 */
const UNMATCHED: Platform = { architecture: "unknown", os: "unknown" };

/**
 * It has no name and says that it belongs to an image, so that nobody takes it for one: docker
 * would list it.
 */
function companionEntry({ top, subject, kind, artifactType, isIndex }: Companion): unknown {
  return {
    mediaType: top.mediaType,
    digest: top.digest,
    size: top.bytes.length,
    annotations: { [SUBJECT_KEY]: subject, ...dropEmpty({ kind }) },
    ...dropEmpty({ artifactType, platform: isIndex && UNMATCHED }),
  };
}

const isReferredTo = ({ digest }: FetchedManifest, referrers: readonly Companion[]): boolean =>
  referrers.some(({ subject }) => subject === digest);

/** Whether there is a signature, whoever made it. */
const hasSignature = ({ digest }: FetchedManifest, referrers: readonly Companion[]): boolean =>
  referrers.some(
    ({ subject, contents }) =>
      subject === digest && contents.some(({ manifest }) => manifest.layers.some(isSignature)),
  );

/**
 * How `cosign save` marks what it signed. For an index that has bundles only, `cosign verify` wants
 * `image` too.
 */
function cosignKind(signed: FetchedManifest, referrers: readonly Companion[]): string | undefined {
  const own = referrers.filter(({ subject }) => subject === signed.digest);
  const hasTag = own.some(({ kind }) => kind === COSIGN_TAGS[0]?.kind);
  const isIndexEntry = hasTag && INDEX_TYPES.includes(signed.mediaType);
  if (own.length === 0) return undefined;
  return `dev.cosignproject.cosign/${isIndexEntry ? "imageIndex" : "image"}`;
}

/**
 * What has to be signed: the digest that a reference names, or any after it that this one leads to.
 */
type Unproven = Readonly<{ registry: Registry; where: string; digests: readonly string[] }>;

/** One of the signers has signed one of the digests, by what refers to them. */
async function requireSignature(
  session: Session,
  { registry, where, digests }: Unproven,
  referrers: readonly Companion[],
  signers: readonly SignerKey[],
): Promise<void> {
  const layers = referrers
    .filter(({ subject }) => digests.includes(subject))
    .flatMap(({ contents }) => contents.flatMap(({ manifest }) => manifest.layers))
    .filter(isSignature);
  checkSignatureCount(layers, where);

  const read = (layer: Descriptor) => orMissing(registry.signature(layer));
  const { concurrency } = session.settings;
  const verdicts = await mapConcurrently(layers, concurrency, async (layer): Promise<Verdict> => {
    const bytes = layer.size > LIMITS.configBytes ? undefined : await read(layer);
    return bytes ? judge(readSignature(layer, bytes, signers), digests) : "unreadable";
  });
  const pinned = `${where.replace(/@.*/, "")}@${digests[0]}`;
  if (!verdicts.includes("good")) refuseUnsigned(pinned, verdicts, signers, registry.denial);
}

/** The same without an image that takes them along: its signatures are looked for now. */
async function findSignature(
  session: Session,
  unproven: Unproven,
  signers: readonly SignerKey[],
): Promise<void> {
  if (signers.length === 0) return;
  const { registry, where, digests } = unproven;
  const referrers = await new ReferrerSearch(session, registry, where, digests).run();
  await requireSignature(session, unproven, referrers, signers);
}

const isEd25519 = ({ publicKey }: SignerKey): boolean => publicKey.asymmetricKeyType === "ed25519";

const VERDICT_WORDS: readonly (readonly [verdict: Verdict, words: string])[] = [
  ["other key", "made by another key, or of something that was changed since"],
  ["other subject", "by the key given, but of something else"],
  ["keyless", "keyless, which needs Sigstore's trust root and is not checked here"],
  ["unreadable", "in no form that is known here"],
];

/** What was found in place of a signature. */
function refuseUnsigned(
  where: string,
  verdicts: readonly Verdict[],
  signers: readonly SignerKey[],
  denial?: string,
): never {
  const found = VERDICT_WORDS.flatMap(([verdict, words]) => {
    const count = verdicts.filter((each) => each === verdict).length;
    return count === 0 ? [] : [`${counted(count, "signature")} ${words}`];
  });
  const isPrehashed = verdicts.includes("other key") && signers.some(isEd25519);
  if (isPrehashed)
    found.push("what cosign signs with an Ed25519 key is prehashed, and not checked here");
  if (found.length === 0) found.push("no signature at all");
  if (denial !== undefined) found.push(`but there may be one that is denied: ${denial}`);
  return fail(
    "SIGNATURE",
    `${where} is not signed by any key given (\`signedBy\`)\n  found: ${found.join("; ")}`,
  );
}

// ====== 14. Library ======
// What a program calls; the command is its first user. References → named images → manifests → plan
// → DEST: all is resolved, and every failure named, before a layer moves. Messages name an option
// as `option`, so that a program (the command is one) can put its own word for it there.

// ------ Options ------

type OptionKind =
  | "a string"
  | "a number"
  | "true or false"
  | "a list of strings"
  | '"all" or a list of strings'
  | "an object of strings"
  | "an object of lists of strings"
  | "an AbortSignal"
  | "a function";

/** What each option has to be. One that is not here is a typo, and refused. */
const OPTION_KINDS = {
  url: "a string",
  scheme: "a string",
  osType: "a string",
  archType: "a string",
  variant: "a string",
  platforms: '"all" or a list of strings',
  name: "a string",
  renames: "an object of strings",
  reuse: "a list of strings",
  since: "a string",
  dryRun: "true or false",
  referrers: "true or false",
  signedBy: "a list of strings",
  username: "a string",
  password: "a string",
  token: "a string",
  tlsCert: "a string",
  tlsKey: "a string",
  caCert: "a string",
  insecure: "true or false",
  namespace: "a string",
  mirrors: "an object of lists of strings",
  concurrency: "a number",
  retries: "a number",
  timeoutMs: "a number",
  environment: "an object of strings",
  signal: "an AbortSignal",
  onProgress: "a function",
  onWarning: "a function",
} as const satisfies Record<keyof PullerOpts, OptionKind>;

const isStringOrNothing = (value: unknown): boolean =>
  value === undefined || typeof value === "string";

const IS_OF_KIND: Readonly<Record<OptionKind, (value: unknown) => boolean>> = {
  "a string": (value) => typeof value === "string",
  "a number": (value) => typeof value === "number",
  "true or false": (value) => typeof value === "boolean",
  "a list of strings": isStringList,
  '"all" or a list of strings': (value) => value === "all" || isStringList(value),
  "an object of strings": (value) =>
    isRecord(value) && Object.values(value).every(isStringOrNothing),
  "an object of lists of strings": (value) =>
    isRecord(value) && Object.values(value).every(isStringList),
  "an AbortSignal": (value) => value instanceof AbortSignal,
  "a function": (value) => typeof value === "function",
};

/** No path, host or name has one; Node refuses it by a TypeError, when it gets that far. */
function hasNul(value: unknown): boolean {
  if (Array.isArray(value)) return value.some(hasNul);
  return typeof value === "string" && value.includes("\0");
}

/**
 * Without types nothing else says so. A value is not shown: it may be a secret in the wrong place.
 */
function checkKinds(options: object, kinds: Readonly<Record<string, OptionKind>>): void {
  if (!isRecord(options)) fail("BAD_OPTION", "the options are not an object");
  for (const [name, value] of Object.entries(options)) {
    if (!Object.hasOwn(kinds, name)) {
      const nearest = nearestName(name, Object.keys(kinds));
      const suggestion = nearest === undefined ? "" : `: did you mean \`${nearest}\`?`;
      fail("BAD_OPTION", `unknown option \`${printable(name, 60)}\`${suggestion}`);
    }
    const kind = kinds[name] as OptionKind;
    if (value !== undefined && !IS_OF_KIND[kind](value))
      fail("BAD_OPTION", `\`${name}\` has to be ${kind}`);
    const isPath = name !== "url"; // which is a BAD_REFERENCE, with its own words
    if (isPath && hasNul(value)) fail("BAD_OPTION", `\`${name}\` has a NUL character`);
  }
}

function checkOption(isRight: boolean, reason: string): void {
  if (!isRight) fail("BAD_OPTION", reason);
}

/** Options that contradict each other, lack each other, or cannot be right by themselves. */
function checkOptions(options: PullOptions): void {
  checkKinds(options, OPTION_KINDS);
  checkConnection(options);
  checkPlatforms(options);
  const { name, renames = {} } = options;
  const hasRenames = Object.keys(renames).length > 0;
  checkOption(name === undefined || !hasRenames, "`name` and `renames` exclude each other");
  checkOption(!name?.includes("@"), "`name` is NAME or NAME:TAG: a digest cannot be given");
}

function checkConnection(options: PullOptions): void {
  const { scheme, tlsCert, tlsKey, username, password, token, namespace } = options;
  const isScheme = scheme === undefined || scheme === "https" || scheme === "http";
  checkOption(isScheme, `\`scheme\` is https or http, not "${printable(String(scheme))}"`);
  const isPair = (tlsCert === undefined) === (tlsKey === undefined);
  checkOption(isPair, "`tlsCert` and `tlsKey` go together: a certificate and its key");
  checkOption(username === undefined || password !== undefined, "`username` needs `password`");
  checkOption(password === undefined || username !== undefined, "`password` needs `username`");
  const isOneKind = token === undefined || username === undefined;
  checkOption(isOneKind, "`token` and `username` exclude each other");
  const isHeader = token === undefined || isHeaderWord(token);
  checkOption(isHeader, "`token` has characters that no header can carry");
  const isNamespace = namespace === undefined || isHost(namespace);
  checkOption(isNamespace, `\`namespace\` is a host, not "${printable(namespace ?? "")}"`);
}

function checkPlatforms({ platforms, osType, archType, variant }: PullOptions): void {
  const isAlone = platforms === undefined || (osType ?? archType ?? variant) === undefined;
  checkOption(isAlone, "`platforms` excludes `osType`, `archType` and `variant`");
  if (platforms === undefined || platforms === "all") return;
  checkOption(platforms.length > 0, "`platforms` is an empty list");
  for (const platform of platforms) {
    const isPlatform = /^[^/]+\/[^/]+(\/[^/]+)?$/.test(platform);
    const quoted = `"${printable(platform)}"`;
    checkOption(isPlatform, `\`platforms\`: ${quoted} is not OS/ARCH or OS/ARCH/VARIANT`);
  }
}

/** A whole number within bounds, or the default. */
function integerOption(
  options: PullOptions,
  name: "concurrency" | "retries" | "timeoutMs",
  otherwise: number,
  [minimum, maximum]: readonly [minimum: number, maximum: number],
): number {
  const value = options[name] ?? otherwise;
  const isRight = Number.isSafeInteger(value) && value >= minimum && value <= maximum;
  const unit = name === "timeoutMs" ? " (milliseconds)" : "";
  const bounds = `a whole number from ${minimum} to ${maximum}${unit}`;
  if (!isRight) fail("BAD_OPTION", `\`${name}\` is ${bounds}, not ${value}`);
  return value;
}

function choiceOf({ platforms = [] }: PullOptions): PlatformChoice {
  if (platforms === "all") return "all";
  return platforms.length > 1 ? platforms.map(splitPlatform) : "one";
}

/** The one platform that is wanted; with several, or all of them, none. */
function wantedOf({ platforms, osType, archType, variant }: PullOptions): Partial<Platform> {
  if (platforms === undefined) return dropEmpty({ os: osType, architecture: archType, variant });
  if (platforms === "all" || platforms.length > 1) return {};
  return splitPlatform(platforms[0] ?? "");
}

/** `OS/ARCH[/VARIANT]` */
function splitPlatform(text: string): Partial<Platform> {
  const [system, architecture, variant] = text.split("/");
  return dropEmpty({ os: system, architecture, variant });
}

/**
 * What the sections above need of a caller's options; what is wrong is named as the option it is.
 */
function settingsOf(
  options: PullOptions,
  environment?: Environment,
  certsDirectory = "/etc/docker/certs.d",
): Settings {
  checkOptions(options);
  const { scheme = "https", insecure = false, tlsCert, tlsKey, caCert } = options;
  const { username, password, token, namespace } = options;
  return {
    scheme,
    insecure,
    environment: environment ?? options.environment ?? process.env,
    certsDirectory,
    timeoutMs: integerOption(options, "timeoutMs", 30_000, [1, 86_400_000]),
    concurrency: integerOption(options, "concurrency", 16, [1, 64]),
    retries: integerOption(options, "retries", 5, [0, 100]),
    wanted: wantedOf(options),
    mirrors: parseMirrors(options.mirrors ?? {}, scheme),
    ...dropEmpty({ tlsCert, tlsKey, caCert, username, password, token, namespace }),
  };
}

// ------ One call ------

/**
 * What a caller's callbacks do to a call. They are called from the handlers of sockets, where
 * nobody catches: what one throws, or what its promise rejects with, stops the call and is thrown
 * at its end.
 */
class Callbacks {
  readonly #stopping: AbortController;
  #failure: { reason: unknown } | undefined;

  constructor(stopping: AbortController) {
    this.#stopping = stopping;
  }

  guard<T>(callback: ((argument: T) => unknown) | undefined): (argument: T) => void {
    if (!callback) return ignore;
    return (argument) => {
      if (this.#failure) return;
      try {
        const result = callback(argument);
        if (result instanceof Promise) result.catch(this.#fail);
      } catch (error) {
        this.#fail(error);
      }
    };
  }

  throwFailure(): void {
    if (this.#failure) throw this.#failure.reason;
  }

  readonly #fail = (reason: unknown): void => {
    this.#failure ??= { reason };
    this.#stopping.abort();
  };
}

/**
 * A call that its caller's signal and callbacks can stop. Whatever stops it, the caller gets his
 * own words for it.
 */
async function stoppable<T>(
  callersSignal: AbortSignal | undefined,
  run: (signal: AbortSignal, callbacks: Callbacks) => Promise<T>,
): Promise<T> {
  const stopping = new AbortController();
  const { signal } = stopping;
  setMaxListeners(0, signal);
  const callbacks = new Callbacks(stopping);
  // A listener that is taken off again: AbortSignal.any() keeps what it made as long as a signal
  // lives.
  const stop = () => stopping.abort();
  callersSignal?.addEventListener("abort", stop);
  try {
    if (callersSignal?.aborted) stopped();
    const result = await run(signal, callbacks);
    callbacks.throwFailure();
    return result;
  } catch (error) {
    callbacks.throwFailure();
    if (!callersSignal?.aborted) throw error;
    return stopped(callersSignal.reason);
  } finally {
    callersSignal?.removeEventListener("abort", stop);
  }
}

/**
 * Everything that one call opens is closed when it ends, and no secret of its is in an error or a
 * warning. Tests give `replaced`: a clock of their own, say.
 */
async function withSession<T>(
  options: PullOptions | PullerOpts,
  run: (session: Session, onProgress: (progress: Progress) => void) => Promise<T>,
  replaced: Partial<Session & Settings> = {},
): Promise<T> {
  const settings = settingsOf(options, replaced.environment, replaced.certsDirectory);
  const secrets = new Secrets();
  secrets.add(settings.password, settings.token);
  return stoppable(options.signal, async (signal, callbacks) => {
    const sendWarning = callbacks.guard(options.onWarning);
    const warn = (message: string) => sendWarning(secrets.strike(message));
    const transport = new Transport(settings, secrets);
    const session: Session = {
      settings,
      transport,
      clock: systemClock,
      signal,
      warn,
      secrets,
      challenges: new Map(),
      helpers: new Map(),
      registries: new Map(),
      budget: new Budget(),
      mirrorFaults: new MirrorFaults(),
      ...replaced,
    };
    try {
      return await run(session, callbacks.guard(options.onProgress));
    } catch (error) {
      secrets.strikeError(error);
      throw error;
    } finally {
      transport.close();
    }
  });
}

const NO_PROGRESS: Progress = Object.freeze({
  phase: "resolve",
  doneBytes: 0,
  totalBytes: 0,
  fetchedBytes: 0,
  blobsDone: 0,
  blobsTotal: 0,
  moving: [],
});

/** Turns what happens into Progress; bytes that are fetched again do not make it fall. */
function progressReporter(onProgress: (progress: Progress) => void) {
  const progressOf = ({ descriptor, doneBytes }: BlobState): BlobProgress => ({
    digest: descriptor.digest,
    sizeBytes: descriptor.size,
    doneBytes,
  });
  let highestBytes = 0;
  onProgress(NO_PROGRESS);

  const report = (transfer: Transfer, phase: Progress["phase"], finished?: BlobState): void => {
    const { blobs, totalBytes, doneBytes, fetchedBytes, blobsDone, activeBlobs } = transfer;
    highestBytes = Math.max(highestBytes, Math.min(totalBytes, doneBytes));
    const moving = [...activeBlobs].sort((left, right) => left.offset - right.offset);
    onProgress({
      phase,
      doneBytes: phase === "finish" ? totalBytes : highestBytes,
      totalBytes,
      fetchedBytes,
      blobsDone,
      blobsTotal: blobs.length,
      moving: moving.map(progressOf),
      ...(finished && { finished: progressOf(finished) }),
    });
  };

  return {
    observe: (transfer: Transfer, finished?: BlobState) => report(transfer, "fetch", finished),
    finish: (transfer: Transfer) => report(transfer, "finish"),
  };
}

// ------ Lists of images ------

/** The images that a list names: one a line; or the `image:` values of a YAML or JSON document. */
interface ImageList {
  /** As they are written, each once. */
  references: readonly string[];
  format: "lines" | "yaml" | "json";
  /** How many `image:` values could not be read: anchors, aliases, text over several lines. */
  unread: number;
}

/**
 * Text as editors and shells leave it: UTF-8, or UTF-16 with a byte order mark (PowerShell's `>`).
 */
function decodeText(bytes: Uint8Array): string {
  const mark = `${bytes[0]},${bytes[1]}`;
  if (mark === "255,254") return new TextDecoder("utf-16le").decode(bytes);
  if (mark === "254,255")
    return new TextDecoder("utf-16le").decode(
      Buffer.from(bytes.subarray(0, bytes.length & ~1)).swap16(),
    );
  return new TextDecoder().decode(bytes);
}

/**
 * Reads a list of images: lines, with `#` before comments; or YAML or JSON as Kubernetes, Compose
 * and `helm template` have it, of which each `image:` value is taken.
 */
function parseImageList(content: string | Uint8Array): ImageList {
  const text = typeof content === "string" ? content : decodeText(content);
  const json = /^\s*[[{]/.test(text) ? parseJson(text) : undefined;
  const unique = (values: readonly string[]) => [...new Set(values)];
  if (json !== undefined)
    return { references: unique(imagesInJson(json)), format: "json", unread: 0 };

  // In a list a colon has something right behind it; in a document there are a `key: value`,
  // braces, or ---.
  const isDocument = /^(---|\s*[[{])|^\s*(- +)*("[^"]*"|'[^']*'|[\w./-]+)[ \t]*:[ \t]+\S/m.test(
    text,
  );
  if (isDocument) {
    const scan = new YamlScan();
    for (const line of text.split(/\r?\n/)) scan.read(line);
    scan.end();
    return { references: unique(scan.images), format: "yaml", unread: scan.unread };
  }
  const lines = text.split(/\r?\n/).map((line) => line.replace(/(^|\s)#.*$/, "").trim());
  return { references: unique(lines.filter((line) => line !== "")), format: "lines", unread: 0 };
}

/**
 * What the list of a pod's images says of one that was loaded by its ID: there is nothing to pull.
 */
const isImageId = (value: string): boolean => /^sha256:[0-9a-f]{64}$/.test(value);

function imagesInJson(document: unknown): string[] {
  const images: string[] = [];
  const values = [document]; // a stack of our own: a document may be deeper than the engine's
  while (values.length > 0) {
    const value = values.pop();
    if (typeof value !== "object" || value === null) continue;
    const { image } = value as { image?: unknown };
    if (typeof image === "string" && image !== "" && !isImageId(image)) images.push(image);
    values.push(...Object.values(value).reverse());
  }
  return images;
}

/**
 * Takes `image:` values out of YAML, line by line. It is no YAML reader: it knows where text is
 * that only looks like a key (block scalars, quotes over several lines, comments), and takes plain
 * and quoted words.
 */
class YamlScan {
  readonly images: string[] = [];
  unread = 0;
  /** The lines of a block scalar are deeper than this. */
  #blockColumn: number | undefined;
  /** The quote that ends a text which began on an earlier line. */
  #openQuote: '"' | "'" | undefined;
  /** Braces or brackets that are not closed yet. */
  #flow: FlowText | undefined;

  read(line: string): void {
    if (this.#continues(line)) return;
    const { isImage, value, parentColumn } = parseYamlLine(line);
    const isFlow = /^[[{]/.test(value);
    if (isFlow) this.#readFlow(value);
    const isPlain = !isFlow && !this.#beginsText(value, parentColumn);

    if (isImage && isPlain) this.#take(value);
    else if (isImage) this.unread += 1;
  }

  /** Whether a line belongs to what began above it: a quote, braces, a block scalar. */
  #continues(line: string): boolean {
    if (this.#openQuote) {
      if (endsQuote(line, this.#openQuote)) this.#openQuote = undefined;
      return true;
    }
    if (this.#flow && !line.startsWith("---")) {
      this.#readFlow(line);
      return true;
    }
    this.end();
    const column = line.search(/\S/);
    const isText = this.#blockColumn !== undefined && column > this.#blockColumn;
    if (column < 0 || isText) return true;
    this.#blockColumn = undefined;
    return false;
  }

  /**
   * Whether a value goes on in the lines below: a block scalar (`|`, `>`), or a quote that is not
   * closed.
   */
  #beginsText(value: string, parentColumn: number): boolean {
    if (/^(?:[&!]\S+\s+)*[|>][-+\d]*(?:\s+#.*)?$/.test(value)) {
      this.#blockColumn = parentColumn;
      return true;
    }
    const quote = value[0];
    if ((quote !== '"' && quote !== "'") || endsQuote(value.slice(1), quote)) return false;
    this.#openQuote = quote;
    return true;
  }

  /** No more lines come. */
  end(): void {
    if (this.#flow) this.#takeFlow(this.#flow.text);
    this.#flow = undefined;
  }

  #readFlow(line: string): void {
    this.#flow ??= new FlowText();
    this.#flow.add(line);
    if (this.#flow.isClosed) this.end();
  }

  /** `{ name: web, image: nginx }`: quoted text is passed over whole. */
  #takeFlow(text: string): void {
    const entry = /[{,[]\s*(["']?)image\1\s*:\s*("[^"]*"|'[^']*'|[^\s,{}[\]"'][^,}\]]*)/;
    const quoted = /(?<=[[{,:]\s{0,9})(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')/;
    for (const [, , value] of text.matchAll(new RegExp(`${entry.source}|${quoted.source}`, "gs")))
      if (value !== undefined) this.#take(value);
  }

  #take(value: string): void {
    const [, inDouble, inSingle] = /^(?:"([^"]*)"|'([^']*)')/.exec(value) ?? [];
    const plain = value.replace(/(^|\s)#.*$/, "").replace(/\s*(,|\s[}\]]).*$/, "");
    if (/^[&*!{[]/.test(value)) this.unread += 1;
    else this.#add(inDouble ?? inSingle ?? plain.trim());
  }

  #add(word: string): void {
    const isEmpty = ["", "~", "null"].includes(word);
    if (!isEmpty && !isImageId(word)) this.images.push(word);
  }
}

/** YAML's flow style, over as many lines as it takes until its braces and brackets are closed. */
class FlowText {
  text = "";
  #depth = 0;
  #quote: string | undefined;
  #mayQuote = true; // a quote within a word is none: it's

  get isClosed(): boolean {
    return this.#depth <= 0 && this.#quote === undefined;
  }

  add(line: string): void {
    const content = this.#quote === undefined ? line.replace(/(^|\s)#[^"']*$/, "") : line;
    this.text += `${content}\n`;
    for (let at = 0; at < content.length; at += 1) {
      const character = content.charAt(at);
      if (this.#quote === '"' && character === "\\") at += 1;
      else if (this.#quote !== undefined) this.#endQuote(character);
      else this.#take(character);
    }
  }

  /** A second ' right behind the first begins another text, which is as good. */
  #endQuote(character: string): void {
    if (character !== this.#quote) return;
    this.#quote = undefined;
    this.#mayQuote = character === "'";
  }

  #take(character: string): void {
    if ("\"'".includes(character) && this.#mayQuote) this.#quote = character;
    if ("{[".includes(character)) this.#depth += 1;
    if ("}]".includes(character)) this.#depth -= 1;
    const isSpace = /\s/.test(character);
    this.#mayQuote = "{[,:".includes(character) || (this.#mayQuote && isSpace);
  }
}

/**
 * `- key: value`, or a value without a key; nested text is deeper than `parentColumn`. A comment
 * has no value.
 */
function parseYamlLine(line: string): { isImage: boolean; value: string; parentColumn: number } {
  const [, dashes = "", rest = ""] = /^(\s*(?:-\s+)*)(.*)$/.exec(line) ?? [];
  if (rest.startsWith("#")) return { isImage: false, value: "", parentColumn: 0 };
  const [, key, value = ""] =
    /^("[^"]*"|'[^']*'|[^\s"'{[#][^#]*?)\s*:(?:\s+(.*))?$/.exec(rest) ?? [];
  if (key === undefined)
    return { isImage: false, value: rest.trim(), parentColumn: dashes.lastIndexOf("-") };
  const isImage = /^(["']?)image\1$/.test(key);
  return { isImage, value: value.trim(), parentColumn: dashes.length };
}

/**
 * Whether a text that began with a quote ends in this line; a backslash escapes in double quotes, a
 * second ' in others.
 */
function endsQuote(text: string, quote: '"' | "'"): boolean {
  const escapes = quote === '"' ? /\\./g : /''/g;
  return text.replace(escapes, "").includes(quote);
}

// ------ Which images, and under which names ------

type NamedImage = Readonly<{ reference: Reference; name: string }>;

/** These belong to one registry, and may not be shown to another. */
const FOR_ONE_HOST = ["username", "password", "token", "tlsCert", "tlsKey", "namespace"] as const;

const beginsWith = (name: Reference, segments: string): boolean =>
  `${placeOf(name)}/`.startsWith(`${segments}/`);

/**
 * A name whose first path segments are a key of `renames` gets its value in their place; the
 * longest key wins.
 */
function renameImage(name: Reference, renames: Readonly<Record<string, string>>): Reference {
  const place = placeOf(name);
  const [from] = Object.keys(renames)
    .filter((key) => beginsWith(name, key))
    .sort((left, right) => right.length - left.length);
  if (from === undefined) return name;

  const version = formatReference(name).slice(place.length);
  const renamed = `${renames[from]}${place.slice(from.length)}${version}`;
  try {
    return parseReference(renamed);
  } catch (error) {
    const reason = (error as Error).message;
    return fail("BAD_OPTION", `\`renames\` ${from}: ${reason}`, { cause: error });
  }
}

/** The images for references, each once, with the names that they get in DEST. */
async function nameImages(
  texts: readonly string[],
  options: PullOptions,
): Promise<readonly NamedImage[]> {
  const { name: chosenName, namespace, renames = {} } = options;
  if (texts.length === 0) fail("BAD_REFERENCE", "no image reference is given");
  // every bad one is named
  const references = await mapConcurrently(texts, 1, async (text) => parseReference(text));

  const hosts = [...new Set(references.map(({ host }) => host))];
  const bound = FOR_ONE_HOST.find((option) => options[option] !== undefined);
  if (hosts.length > 1 && bound)
    fail(
      "BAD_OPTION",
      `\`${bound}\` belongs to one registry, and the images are on ${hosts.join(", ")}`,
    );

  const unique = new Map(references.map((reference) => [formatReference(reference), reference]));
  if (chosenName !== undefined && unique.size > 1)
    fail("BAD_OPTION", `\`name\` goes with one image, not with ${unique.size}`);
  const names = new Set<string>();
  return [...unique.values()].map((reference) => {
    const own = renameImage(imageName(reference, namespace), renames);
    const name = formatReference(chosenName === undefined ? own : parseReference(chosenName));
    if (names.has(name))
      fail(
        "BAD_OPTION",
        `two images would have the name ${name} in the tar: \`renames\` parts them`,
      );
    names.add(name);
    return { reference, name };
  });
}

function warnOfRenames(
  { warn }: Session,
  images: readonly NamedImage[],
  { renames = {}, namespace }: PullOptions,
): void {
  const names = images.map(({ reference }) => imageName(reference, namespace));
  for (const from of Object.keys(renames)) {
    const isUsed = names.some((name) => beginsWith(name, from));
    if (!isUsed) warn(`\`renames\`: no name begins with ${printable(from)}`);
  }
}

// ------ A pull ------

type PullRequest = Readonly<{
  images: readonly NamedImage[];
  destination: string | NodeJS.WritableStream | undefined;
  /** Which images of an index; default: the one that is wanted. */
  choice?: PlatformChoice;
  reuse?: readonly string[];
  since?: string | undefined;
  isDryRun?: boolean;
  /** Whether what refers to the images comes too; signers want it in any case. */
  referrers?: boolean;
  signers?: readonly SignerKey[];
}>;

function warnOfLayers({ warn }: Session, images: readonly ResolvedImage[]): void {
  for (const { contents, name } of images) {
    if (contents.some((content) => claimsImage(content.manifest) && !isImageContent(content)))
      warn(`${name} is no image that loads: its config has not one diff_id for each layer`);
    const types = contents
      .flatMap(({ manifest }) => manifest.layers.map(({ mediaType }) => mediaType))
      .join(" ");
    if (/zstd/.test(types))
      warn(`${name} has zstd layers: Docker before 23 and podman before 4 will not load it`);
    if (/\+encrypted/.test(types))
      warn(`${name} has encrypted layers, which load only where their key is`);
    if (/foreign|nondistributable/.test(types))
      warn(`${name} has foreign layers, which Docker on Linux does not take`);
  }
}

/** Proof was asked for: that there is none is no error, and no secret. */
function warnOfBareImages({ warn }: Session, images: readonly ResolvedImage[]): void {
  const bare = images.filter(({ companions }) => companions?.length === 0);
  const [image] = bare;
  if (!image) return;
  const which = bare.length === 1 ? image.name : counted(bare.length, "image");
  warn(`${which}: no signature, attestation or SBOM was found`);
}

/** Entries without a name are new to some loaders. */
function warnOfCompanions({ warn }: Session, images: readonly ResolvedImage[]): void {
  const companions = images.flatMap((image) => image.companions ?? []);
  if (companions.length === 0) return;
  const ofIndex = companions.every(isReferrer) ? "" : ", and ctr no --all-platforms";
  warn(
    `${counted(companions.length, "manifest")} of proof beside the images: podman load makes a digest ` +
      `of its own, skopeo wants the name (oci-archive:TAR:NAME)${ofIndex}`,
  );
}

function warnOfOmitted({ warn }: Session, { omitted }: Plan, since: string): void {
  if (omitted.length === 0) {
    warn(`${since} holds none of the layers at the bottom of an image: nothing is left out`);
    return;
  }
  const size = formatBytes(sumOf(omitted, (layer) => layer.size));
  warn(
    `left out ${counted(omitted.length, "layer")} (${size}) that ${since} holds: load that first. ` +
      "docker's containerd store and ctr --no-unpack take this tar without it, in silence",
  );
}

/**
 * The images that the tar of `since` holds. It may not be DEST: the delta would take the place of
 * its base.
 */
async function chainsIn(
  since: string | undefined,
  destination: Destination | undefined,
): Promise<string[][]> {
  if (since === undefined) return [];
  return withTars([since], async ([base]) => {
    if (!base) return [];
    if (destination?.kind === "tar") {
      const target = await fs.stat(destination.file).catch(ignore);
      const { ino, dev } = await base.handle.stat();
      if (target?.ino === ino && target.dev === dev)
        fail(
          "BAD_OPTION",
          `\`since\` ${since} is DEST: the delta would take the place of its own base`,
        );
    }
    return dockerChains(base);
  });
}

/** Tars at hand for as long as `run` takes. */
async function withTars<T>(files: readonly string[], run: (tars: Tars) => Promise<T>): Promise<T> {
  const tars: OpenTar[] = [];
  try {
    for (const file of files) tars.push(await openTarFile(file));
    return await run(tars);
  } finally {
    await closeTars(tars);
  }
}

type Counts = Pick<PullReport, "fetchedBytes" | "reusedBytes" | "resumedBytes">;

/**
 * What a pull would fetch, by what DEST and tars at hand claim to hold; whether they lie is seen
 * when they are read.
 */
async function estimate(
  { entries }: Plan,
  destination: Destination | undefined,
  tars: Tars,
): Promise<Counts> {
  const atHand = destination?.kind === "tar" ? await openAtHand([destination.file]) : [];
  const isThere = async ({ digest, size }: Descriptor) => {
    if (destination?.kind === "layout") {
      const file = path.join(destination.folder, blobPath(digest));
      const stats = await fs.stat(file).catch(ignore);
      if (stats?.size === size) return true;
    }
    return [...tars, ...atHand].some(({ blobs }) => blobs.get(digest)?.sizeBytes === size);
  };

  const counts = { fetchedBytes: 0, reusedBytes: 0, resumedBytes: 0 };
  for (const { blob } of entries) {
    if (!blob) continue;
    const counter = (await isThere(blob.descriptor)) ? "reusedBytes" : "fetchedBytes";
    counts[counter] += blob.descriptor.size;
  }
  await closeTars(atHand);
  return counts;
}

/** References to DEST, within one session. */
async function runPull(session: Session, request: PullRequest, observe: Observer) {
  const { images: wanted, choice = "one", reuse = [], since, signers = [] } = request;
  const isProofWanted = request.referrers === true || signers.length > 0;
  const named = typeof request.destination === "string" ? request.destination : "the stream";
  const destination =
    request.destination === undefined ? undefined : await parseDestination(request.destination);
  const chains = await chainsIn(since, destination);

  return withTars(reuse, async (tars) => {
    const { concurrency } = session.settings;
    const images = await mapConcurrently(wanted, concurrency, async ({ reference, name }) => {
      const image = await resolveImage(session, reference, name, choice);
      return isProofWanted ? addProof(session, image, signers) : image;
    });
    const plan = planTar(images, layersToOmit(images, chains), planExtras(images));
    warnOfLayers(session, images);
    warnOfBareImages(session, images);
    if (destination?.kind !== "layout") warnOfCompanions(session, images);
    if (since !== undefined) warnOfOmitted(session, plan, since);
    const sizeBytes = destination?.kind === "layout" ? plan.blobBytes : plan.sizeBytes;
    if (request.isDryRun || !destination)
      return { images, plan, sizeBytes, counts: await estimate(plan, destination, tars) };

    const job = { session, plan, tars, observe };
    const transfer = await onDisk(`cannot write ${named}`, pullInto(destination, job));
    return { images, plan, sizeBytes, counts: transfer, transfer };
  });
}

/** A public key, given as PEM or as the path of a PEM file. */
async function readSigner(key: string): Promise<SignerKey> {
  if (key.includes("-----BEGIN")) return parsePublicKey(key, "in `signedBy`");
  const pem = await readBeginning(key, LIMITS.keyFileBytes).catch((error) =>
    fail("BAD_OPTION", `cannot read \`signedBy\` ${key}: ${diskWords(error)}`),
  );
  return parsePublicKey(pem.toString("utf8"), key);
}

/** Of a device or a pipe, too, no more than that is read. */
async function readBeginning(file: string, maximumBytes: number): Promise<Buffer> {
  const handle = await fs.open(file, "r");
  try {
    return await readAt(handle, "here", maximumBytes);
  } finally {
    await handle.close();
  }
}

/** A list without a key is a mistake that would check nothing. */
async function readSigners(keys: readonly string[] | undefined): Promise<SignerKey[]> {
  if (keys?.length === 0) fail("BAD_OPTION", "`signedBy` is an empty list");
  return mapConcurrently(keys ?? [], 1, readSigner);
}

function pulledImage({ reference, name, top, platform, contents }: ResolvedImage): PulledImage {
  const { digest } = top;
  return {
    reference: formatReference(reference),
    pinned: formatReference({ ...reference, digest }),
    name,
    digest,
    platform,
    layers: sumOf(contents, ({ manifest }) => manifest.layers.length),
  };
}

function checkDest(dest: unknown, isDryRun: boolean): void {
  if (dest === undefined && isDryRun) return;
  const isStream = typeof (dest as { write?: unknown } | null)?.write === "function";
  const isPath = typeof dest === "string" && dest !== "" && !hasNul(dest);
  checkOption(isStream || isPath, "`dest` has to be a path or a Writable");
}

/**
 * Pulls images into one tar, folder or stream: `dest` is a file's path, a folder's (one that
 * exists, or a path that ends in `/`: an OCI image layout, to which is added), or a Writable, which
 * gets the tar in order and is not ended. Only with `dryRun` it may be undefined. Throws
 * ImgpullError: BAD_REFERENCE and BAD_OPTION before anything is asked for.
 */
async function pullImages(
  references: readonly string[],
  dest: string | OutputStream | undefined,
  options: PullOptions = {},
): Promise<PullReport> {
  checkOptions(options);
  if (!isStringList(references)) fail("BAD_OPTION", "`references` has to be a list of strings");
  const { dryRun: isDryRun = false, referrers = false, reuse = [], since } = options;
  checkDest(dest, isDryRun);
  const images = await nameImages(references, options);
  const signers = await readSigners(options.signedBy);

  return withSession(options, async (session, onProgress) => {
    const { observe, finish } = progressReporter(onProgress);
    warnOfRenames(session, images, options);
    const destination = dest as string | NodeJS.WritableStream | undefined;
    const what = { images, destination, choice: choiceOf(options), isDryRun };
    const pulled = await runPull(session, { ...what, reuse, since, referrers, signers }, observe);
    if (pulled.transfer) finish(pulled.transfer);
    const { fetchedBytes, reusedBytes, resumedBytes } = pulled.counts;
    return {
      images: pulled.images.map(pulledImage),
      sizeBytes: pulled.sizeBytes,
      fetchedBytes,
      reusedBytes,
      resumedBytes,
      isUnchanged: pulled.transfer?.isUnchanged ?? false,
      omitted: pulled.plan.omitted,
    };
  });
}

// ------ One image ------

/** https, this system's platform. */
function newPullerOpts(url: string): PullerOpts {
  const { os: osType, architecture: archType } = hostPlatform();
  return { url, scheme: "https", osType, archType };
}

/** One image. Its constructor throws BAD_REFERENCE and BAD_OPTION, its methods the rest. */
class Puller {
  readonly #opts: PullerOpts;
  readonly #reference: Reference;

  constructor(urlOrOpts: string | PullerOpts) {
    const opts = typeof urlOrOpts === "string" ? { url: urlOrOpts } : urlOrOpts;
    settingsOf(opts);
    if (opts.url === undefined) fail("BAD_OPTION", "`url` is missing: the image's reference");
    this.#reference = parseReference(opts.url);
    this.#opts = { ...opts };
  }

  getUrl(): string {
    return this.#opts.url;
  }

  /** The options, with the defaults in place of what was left out. */
  getOpts(): PullerOpts {
    const { timeoutMs, retries, insecure } = settingsOf(this.#opts);
    const isByPlatforms = this.#opts.platforms !== undefined;
    const { os: osType, architecture: archType } = wantedPlatform(wantedOf(this.#opts));
    const platform = isByPlatforms ? {} : { osType, archType };
    const defaults = { scheme: "https", insecure, retries, timeoutMs, ...platform } as const;
    return { ...defaults, ...dropEmpty(this.#opts), url: this.#opts.url };
  }

  /**
   * Leaves a verified tar at `dest`, or adds to the OCI layout there where that is a directory or
   * ends in "/".
   */
  async pullTar(dest: string | OutputStream): Promise<PullResult> {
    const { images, sizeBytes, fetchedBytes } = await pullImages(
      [this.#opts.url],
      dest,
      this.#opts,
    );
    const { name, digest, platform, layers } = images[0] as PulledImage;
    return { name, digest, platform, layers, sizeBytes, fetchedBytes };
  }

  /**
   * The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no
   * index for it.
   */
  async pullManifest(type: "list" | "image"): Promise<ManifestHolder> {
    if (type === "image") {
      const isOne = choiceOf(this.#opts) === "one";
      checkOption(isOne, "`platforms` names several, and a manifest is of one image");
      return withSession(this.#opts, async (session) => {
        const image = await resolveImage(session, this.#reference, "", "one");
        await this.#checkSigned(session, [image.asked.digest, image.top.digest]);
        return this.#holder(image.top);
      });
    }
    if (type !== "list")
      fail("BAD_OPTION", `a manifest is "list" or "image", not "${printable(String(type))}"`);

    const holder = await this.getManifest();
    if (isRecord(holder.manifest) && "manifests" in holder.manifest) return holder;
    const where = formatReference(this.#reference);
    return fail("NOT_FOUND", `${where} is one image, without a list: ask for \`manifest\` image`);
  }

  /** Whatever the registry has under the reference: an index or an image manifest. */
  getManifest(): Promise<ManifestHolder> {
    return withSession(this.#opts, async (session) => {
      const registry = registryOf(session, this.#reference);
      const fetched = await registry.manifest(versionOf(this.#reference));
      parseManifest(fetched, this.#opts.url);
      await this.#checkSigned(session, [fetched.digest]);
      return this.#holder(fetched);
    });
  }

  /**
   * The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something
   * out.
   */
  headManifest(): Promise<{ mediaType: string; digest: string; size: number }> {
    return withSession(this.#opts, async (session) => {
      const registry = registryOf(session, this.#reference);
      const wanted = versionOf(this.#reference);
      const head = await registry.head(wanted);
      const isRight = head && (!isDigest(wanted) || head.digest === wanted);
      const { mediaType, digest, size } = isRight ? head : await describe();
      await this.#checkSigned(session, [digest]);
      return { mediaType, digest, size };

      async function describe() {
        const manifest = await registry.manifest(wanted);
        return { ...manifest, size: manifest.bytes.length };
      }
    });
  }

  /**
   * Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept.
   */
  async pullBlobs(holder: ManifestHolder, dir: string): Promise<void> {
    checkOption(holder?.bytes instanceof Uint8Array, "`holder` is what pullManifest() gives");
    checkDest(dir, false);
    const fetched = { ...holder, bytes: Buffer.from(holder.bytes) };
    await withSession(this.#opts, (session, onProgress) =>
      withTars(this.#opts.reuse ?? [], async (tars) => {
        const manifest = parseManifest(fetched, holder.imageUrl);
        if (manifest.kind !== "image")
          return fail("NOT_AN_IMAGE", `${holder.imageUrl}: a list of manifests has no blobs`);

        const descriptors = [manifest.config, ...manifest.layers];
        const unique = new Map(descriptors.map((descriptor) => [descriptor.digest, descriptor]));
        const { observe, finish } = progressReporter(onProgress);
        const registry = registryOf(session, this.#reference);
        await this.#checkSigned(session, await this.#digestsAbove(session, fetched));
        const remote = [...unique.values()].filter(({ data }) => data === undefined);
        const blobs = remote.map((descriptor) => new BlobState(descriptor, registry, 0, tars));
        const doing = `cannot write ${dir}`;
        const filling = inFolder(dir, async () => {
          for (const { digest, data } of unique.values())
            if (data) await fs.writeFile(path.join(dir, hexOf(digest)), data);
          return pullToFolder({ session, blobs, folder: dir, nameOf: hexOf, observe });
        });
        finish(await onDisk(doing, filling));
      }),
    );
  }

  /** SIGNATURE where `signedBy` has keys, and none of them has signed one of these. */
  async #checkSigned(session: Session, digests: readonly string[]): Promise<void> {
    const signers = await readSigners(this.#opts.signedBy);
    const registry = registryOf(session, this.#reference);
    const where = formatReference(this.#reference);
    await findSignature(session, { registry, where, digests: [...new Set(digests)] }, signers);
  }

  /**
   * The digest of a manifest that a caller gives, after that of the index which the reference
   * names, if it leads there.
   */
  async #digestsAbove(session: Session, { digest, bytes }: FetchedManifest): Promise<string[]> {
    const own = digestOf(bytes, digest);
    if (!this.#opts.signedBy?.length) return [own];
    const registry = registryOf(session, this.#reference);
    const where = formatReference(this.#reference);
    const asked = await registry.manifest(versionOf(this.#reference));
    const above = await pathTo(own, asked, childrenOf(registry, where), where);
    return above ? [asked.digest, own] : [own];
  }

  #holder({ mediaType, digest, bytes }: FetchedManifest): ManifestHolder {
    return { mediaType, digest, bytes, manifest: parseJson(bytes), imageUrl: this.#opts.url };
  }
}

// ====== 15. Looking at a tar ======
// What a tar holds and whether it is whole, offline: ours, OCI archives, docker save's old and new,
// crane's, skopeo's; and OCI layout folders. One pass, in order: each file is hashed, and unpacked
// and hashed, as it goes by; references, sizes, diff_ids and loaders are judged at the end, as
// values, of which the last part makes sentences. Anyone may have made it: every type, reference,
// name and size in it is checked before it is used or printed.

// ------ Sources ------

/**
 * A file in what is looked at. In a stream its content must be read before the next file is asked
 * for.
 */
type TarMember = Readonly<{ entry: TarEntry; content: () => AsyncIterable<Buffer> }>;

/** In errors; a stream has no name but the command's. */
const nameOfSource = (source: TarSource): string => (typeof source === "string" ? source : "-");

interface OpenTarSource {
  readonly where: string;
  /** The content of several members may be read at once. */
  readonly isSeekable: boolean;
  readonly isFolder?: boolean;
  /** Undefined where that is not known before the end. */
  readonly sizeBytes: number | undefined;
  /** Of the tar as a whole. */
  readonly packing?: Packing | undefined;
  /** It is packed as some loaders do not take it: bytes follow, or something precedes. */
  readonly isOddlyPacked?: () => boolean;
  /** So far, of what lies there; of a file all that there is. */
  readonly readBytes: () => number;
  /** So far, of the tar, as it is once unpacked. */
  readonly position: () => number;
  /** A tar without the blocks that end it was cut off; known when all members were seen. */
  readonly hasTrailer: () => boolean;
  readonly members: () => AsyncGenerator<TarMember>;
  readonly close: () => Promise<void>;
}

async function openTarSource(source: TarSource, signal?: AbortSignal): Promise<OpenTarSource> {
  if (typeof source !== "string")
    return openStream(nameOfSource(source), readableOf(source), signal);

  const stats = await fs.stat(source);
  if (stats.isDirectory()) return openFolder(source);
  if (stats.isFIFO()) return openStream(source, await openPipe(source, signal), signal);
  if (!stats.isFile() && !stats.isCharacterDevice())
    return fail("BAD_TAR", `${source}: it is not a file`);

  const handle = await fs.open(source, "r");
  const isPacked = packingOf(await readAt(handle, 0, BLOCK)) !== undefined;
  if (stats.isFile() && !isPacked) return openFile(source, handle, stats.size);
  const chunks = handle.createReadStream({ highWaterMark: TUNING.batchBytes });
  try {
    return { ...(await openStream(source, chunks, signal)), sizeBytes: stats.size };
  } catch (error) {
    chunks.destroy();
    throw error;
  }
}

const readableOf = (source: AsyncIterable<Uint8Array>): Readable =>
  source instanceof Readable ? source : Readable.from(source, { objectMode: false });

/**
 * Waits for a writer, and lets itself be stopped meanwhile and later: plain file operations on a
 * pipe would not.
 */
async function openPipe(file: string, signal?: AbortSignal): Promise<Readable> {
  if (signal?.aborted) stopped(signal.reason);
  let isOver = false;
  // Opening a pipe ends when it has a writer: to stop, we become that for a moment. It may not have
  // begun yet.
  const letGo = async () => {
    while (!isOver) {
      const writer = await fs.open(file, O_WRONLY | O_NONBLOCK).catch(ignore);
      await writer?.close();
      await delay(TUNING.readerPollMs);
    }
  };
  signal?.addEventListener("abort", letGo, { once: true });
  try {
    const descriptor = await openDescriptor(file);
    return new net.Socket({ fd: descriptor, readable: true, writable: false });
  } finally {
    isOver = true;
    signal?.removeEventListener("abort", letGo);
  }
}

const openDescriptor = (file: string): Promise<number> =>
  new Promise((resolve, reject) => {
    openCallback(file, "r", (error, descriptor) => (error ? reject(error) : resolve(descriptor)));
  });

function openFile(where: string, handle: fs.FileHandle, sizeBytes: number): OpenTarSource {
  let decoder = new TarDecoder();
  async function* members(): AsyncGenerator<TarMember> {
    decoder = new TarDecoder();
    for await (const entry of readTar(handle, where, decoder)) {
      const end = entry.offset + entry.sizeBytes;
      yield { entry, content: () => fillHoles(readPlace(handle, entry.offset, end), entry.holes) };
    }
  }
  return {
    where,
    isSeekable: true,
    sizeBytes,
    readBytes: () => sizeBytes,
    position: () => sizeBytes,
    hasTrailer: () => decoder.hasTrailer,
    members,
    close: () => handle.close(),
  };
}

const PLAIN_FILE = { type: "0", linkName: "", isRooted: false, offset: 0 };

/** Of a folder only what the image layout specification names is looked at. */
async function openFolder(folder: string): Promise<OpenTarSource> {
  const files = ["oci-layout", "index.json", "manifest.json"];
  for (const algorithm of await listOptional(path.join(folder, "blobs")))
    for (const name of await listOptional(path.join(folder, "blobs", algorithm)))
      files.push(`blobs/${algorithm}/${name}`);

  const entries: TarEntry[] = [];
  for (const name of files) {
    const stats = await fs.stat(path.join(folder, name)).catch(ignore);
    if (stats?.isFile()) entries.push({ ...PLAIN_FILE, name, sizeBytes: stats.size });
  }

  async function* contentOf({ name, sizeBytes }: TarEntry): AsyncGenerator<Buffer> {
    const handle = await fs.open(path.join(folder, name), "r");
    try {
      yield* readPlace(handle, 0, sizeBytes);
    } finally {
      await handle.close();
    }
  }
  async function* members(): AsyncGenerator<TarMember> {
    for (const entry of entries) yield { entry, content: () => contentOf(entry) };
  }
  const sizeOfAll = sumOf(entries, ({ sizeBytes }) => sizeBytes);
  return {
    where: folder,
    isSeekable: true,
    isFolder: true,
    sizeBytes: sizeOfAll,
    readBytes: () => sizeOfAll,
    position: () => sizeOfAll,
    hasTrailer: () => true,
    members,
    close: async () => undefined,
  };
}

/** A tar that comes in order, compressed or not. */
async function openStream(
  where: string,
  stream: Readable,
  signal?: AbortSignal,
): Promise<OpenTarSource> {
  if (signal) addAbortSignal(signal, stream); // a wait for bytes ends, too
  const decoder = new TarDecoder();
  const packed = new ByteReader(stream);
  const beginning = await packed.peek(BLOCK);
  const packing = packingOf(beginning);
  const isSkippable = packing === "zstd" && beginning[0] !== ZSTD_FRAME;
  const unpacker = packing && unpackerFor(packing);
  if (packing && !unpacker)
    fail("BAD_TAR", `${where}: it is compressed (${packing}), which cannot be read here`);
  const bytes = unpacker ? new ByteReader(unpackWhole(packed, packing, unpacker)) : packed;

  async function* contentUntil(end: number, name: string): AsyncGenerator<Buffer> {
    yield* bytes.piecesUntil(end);
    if (bytes.position < end) refuseTar(cutWithin(name, bytes.position));
  }
  async function* members(): AsyncGenerator<TarMember> {
    while (!decoder.isAtEnd) {
      const { wantedBytes } = decoder;
      const block = await bytes.read(wantedBytes);
      if (block.length === 0) break;
      if (block.length < wantedBytes) refuseTar(cutWithin("a header", bytes.position));
      const header = takeAt(decoder, block, bytes.position - wantedBytes);
      if (!header) continue;
      const offset = bytes.position;
      const end = offset + header.sizeBytes;
      const entry = entryAt(header, offset);
      yield { entry, content: () => fillHoles(contentUntil(end, entry.name), header.holes) };
      await bytes.skipTo(end);
      if (bytes.position < end) refuseTar(cutWithin(entry.name, bytes.position));
      await bytes.skipTo(end + paddingOf(end));
    }
    await bytes.skipTo(NEVER); // a writer that is not read to its end would fail
  }
  return {
    where,
    isSeekable: false,
    sizeBytes: undefined,
    packing,
    isOddlyPacked: () =>
      isSkippable || (unpacker !== undefined && unpacker.bytesWritten < packed.position),
    readBytes: () => packed.position,
    position: () => bytes.position,
    hasTrailer: () => decoder.hasTrailer,
    members,
    close: async () => {
      stream.destroy();
    },
  };
}

/** Bytes that come in order, taken in the portions that are asked for. */
class ByteReader {
  /** How many were taken. */
  position = 0;
  readonly #chunks: AsyncIterator<Buffer>;
  #ahead: Buffer = Buffer.alloc(0);

  constructor(source: AsyncIterable<Buffer>) {
    this.#chunks = source[Symbol.asyncIterator]();
  }

  /** Up to so many bytes, which stay to be taken; fewer only at the end. */
  async peek(length: number): Promise<Buffer> {
    const chunks = [this.#ahead];
    let aheadBytes = this.#ahead.length;
    while (aheadBytes < length) {
      const { value, done } = await this.#chunks.next();
      if (done) break;
      chunks.push(value);
      aheadBytes += value.length;
    }
    if (chunks.length > 1) this.#ahead = joined(chunks);
    return this.#ahead.subarray(0, length);
  }

  async read(length: number): Promise<Buffer> {
    const bytes = await this.peek(length);
    this.#take(bytes.length);
    return bytes;
  }

  /** What comes next, up to a position or the end. */
  async *piecesUntil(end: number): AsyncGenerator<Buffer> {
    while (this.position < end) {
      const next = await this.peek(1);
      if (next.length === 0) return;
      const piece = this.#ahead.subarray(0, end - this.position);
      this.#take(piece.length);
      yield piece;
    }
  }

  async skipTo(position: number): Promise<void> {
    for await (const _piece of this.piecesUntil(position));
  }

  #take(length: number): void {
    this.#ahead = this.#ahead.subarray(length);
    this.position += length;
  }
}

/** In most cases that is one, which is not copied. */
function joined(chunks: readonly Buffer[]): Buffer {
  const filled = chunks.filter(({ length }) => length > 0);
  const [only = Buffer.alloc(0)] = filled;
  return filled.length < 2 ? only : Buffer.concat(filled);
}

/** A file as it is once its holes are filled with zeros. */
async function* fillHoles(
  stored: AsyncIterable<Buffer>,
  holes: SparseMap | undefined,
): AsyncGenerator<Buffer> {
  if (!holes) return yield* stored;

  const bytes = new ByteReader(stored);
  const zeros = Buffer.alloc(TUNING.headerReadBytes);
  let position = 0;
  for (const [from, to] of [...holes.pieces, [holes.realBytes, holes.realBytes] as const]) {
    for (; position < from; position += zeros.length) yield zeros.subarray(0, from - position);
    yield* bytes.piecesUntil(bytes.position + to - from);
    position = to;
  }
}

/** How long a file is, holes included. */
const lengthOfEntry = ({ holes, sizeBytes }: TarEntry): number => holes?.realBytes ?? sizeBytes;

// ------ Unpacking ------

type Unpacker = Transform & { readonly bytesWritten: number };

/** Undefined where this Node has none: zstd came with 22.15. */
function unpackerFor(packing: Packing, packedBytes = NEVER): Unpacker | undefined {
  const { createGunzip, createZstdDecompress } = load("node:zlib") as Partial<
    typeof import("node:zlib")
  >;
  const isSmall = packedBytes < TUNING.headerReadBytes;
  const options = { chunkSize: isSmall ? TUNING.unpackBytes / 16 : TUNING.unpackBytes };
  if (packing === "gzip") return createGunzip?.(options);
  if (packing === "zstd") return createZstdDecompress?.(options);
  return undefined;
}

/** zlib's and zstd's words for what does not unpack. */
const isUnpackError = (error: unknown): boolean => errorCodeOf(error).startsWith("Z");

const isEndless = (unpackedBytes: number, packedBytes: number): boolean =>
  unpackedBytes > LIMITS.unpackFactor * packedBytes + LIMITS.unpackFloorBytes;

/**
 * What a look at a whole tar may cost: twice the bytes that one file could come to which is as long
 * as the tar, so that the file is named where it is only one. All that is hashed and compared
 * counts, of all its files, holes and layers.
 */
class LookBudget {
  readonly #readBytes: () => number;
  #spentBytes = 0;

  constructor({ readBytes }: OpenTarSource) {
    this.#readBytes = readBytes;
  }

  spend(bytes: number): void {
    this.#spentBytes += bytes;
    if (isEndless(this.#spentBytes / 2, this.#readBytes()))
      refuseTar(
        `its files unpack, all together, to more than ${LIMITS.unpackFactor} times its size`,
      );
  }
}

/** What a compressed tar unpacks to. */
async function* unpackWhole(
  packed: ByteReader,
  packing: Packing | undefined,
  unpacker: Unpacker,
): AsyncGenerator<Buffer> {
  // the reader below meets its error
  const feeding = pipeline(packed.piecesUntil(NEVER), unpacker).catch(ignore);
  let unpackedBytes = 0;
  try {
    for await (const chunk of unpacker as AsyncIterable<Buffer>) {
      unpackedBytes += chunk.length;
      if (isEndless(unpackedBytes, packed.position))
        refuseTar(`it unpacks to more than ${LIMITS.unpackFactor} times its size`);
      yield chunk;
    }
    if (packing === "zstd" && unpacker.bytesWritten < packed.position)
      refuseTar(
        "bytes follow its first zstd frame, which this Node does not read (nodejs/node#64741)",
      );
  } catch (error) {
    const words = `its compression is damaged, or it was cut off, near byte ${unpacker.bytesWritten}`;
    throw isUnpackError(error) ? new ImgpullError("BAD_TAR", words, { cause: error }) : error;
  } finally {
    unpacker.destroy();
    await feeding;
  }
}

/** What a layer came to when it was unpacked. */
type Unpacked = Readonly<{
  packing: Packing | undefined;
  outcome: "whole" | "broken" | "endless" | "not-unpacked";
  /** Of what it unpacks to, by each algorithm that was used. */
  digests: readonly string[];
  isTar: boolean;
  /** The first entry of that tar that stops loaders which unpack it. */
  odd: OddPath | undefined;
  /** More bytes follow after what was unpacked. */
  hasRest: boolean;
}>;

/** Digests of the same bytes by several algorithms. */
class Digests {
  readonly #hashes: readonly (readonly [algorithm: string, hash: Hash])[];

  constructor(algorithms: readonly string[]) {
    this.#hashes = algorithms.map((algorithm) => [algorithm, newHash(`${algorithm}:`)]);
  }

  update(bytes: Buffer): void {
    for (const [, hash] of this.#hashes) hash.update(bytes);
  }

  list(): string[] {
    return this.#hashes.map(([algorithm, hash]) => `${algorithm}:${hash.digest("hex")}`);
  }
}

/** Loaders stop at others: volume labels, GNU's lists of folders, contiguous files. */
const UNPACKED_TYPES = "0123456S";

/** Whether an entry can be unpacked at all, wherever it stands. */
function isUnpackable({ name, type, linkName, attributes }: TarHeader): boolean {
  const isFile = "015S".includes(type);
  const isLinkWrong =
    type === "2" && (linkName === "" || Buffer.byteLength(linkName) > LIMITS.unpackedLinkBytes);
  if (isLinkWrong || attributes === "for-none" || (attributes && !isFile)) return false;
  if (3 * name.length <= LIMITS.unpackedNameBytes) return true; // no letter takes more in UTF-8
  const lengths = name.split("/").map((part) => Buffer.byteLength(part));
  return (
    Math.max(...lengths) <= LIMITS.unpackedNameBytes &&
    sumOf(lengths, (length) => length + 1) <= LIMITS.unpackedPathBytes
  );
}

/**
 * An entry of a layer that stops loaders: docker and podman only where it is a path for the second
 * time, or below what is not there, or all of them.
 */
type OddPath = Readonly<{ kind: "path-twice" | "odd-path"; path: string }>;

/** What stands at a path: 0 where nothing does. */
const GONE = 1;
const FOLDER = 2;
const FILE = 3;
const LINK = 4;
/** Beside one of these: an entry has that path. */
const ENTERED = 8;

/** What stands at each path of a layer. Of the paths only hashes are kept. */
class PathTable {
  count = 0;
  readonly #seed = Math.floor(Math.random() * 2 ** 32);
  #hashes = new Float64Array(256);
  #values = new Uint8Array(256);

  get(path: string): number {
    return this.#values[this.#slotOf(this.#hashOf(path))] ?? 0;
  }

  set(path: string, value: number): void {
    this.#put(this.#hashOf(path), value);
    if (2 * this.count > this.#values.length) this.#grow();
  }

  #put(hash: number, value: number): void {
    const slot = this.#slotOf(hash);
    if (this.#values[slot] === 0) this.count += 1;
    this.#hashes[slot] = hash;
    this.#values[slot] = value;
  }

  #slotOf(hash: number): number {
    const size = this.#values.length;
    let slot = hash % size;
    while (this.#values[slot] !== 0 && this.#hashes[slot] !== hash) slot = (slot + 1) % size;
    return slot;
  }

  #grow(): void {
    const hashes = this.#hashes;
    const values = this.#values;
    this.#hashes = new Float64Array(2 * hashes.length);
    this.#values = new Uint8Array(2 * values.length);
    this.count = 0;
    for (const [slot, value] of values.entries()) if (value) this.#put(hashes[slot] ?? 0, value);
  }

  /** 53 bits: among a million paths two of the same hash are as rare as bad memory. */
  #hashOf(path: string): number {
    let high = this.#seed;
    let low = ~this.#seed;
    for (let at = 0; at < path.length; at += 1) {
      const letter = path.charCodeAt(at);
      high = Math.imul(high ^ letter, 0x9e3779b1);
      low = Math.imul(low ^ letter, 0x5f356495);
      low ^= low >>> 15;
    }
    high = Math.imul(high ^ (high >>> 16), 0x85ebca6b) ^ Math.imul(low ^ (low >>> 13), 0xc2b2ae35);
    return (high & 0x1fffff) * 2 ** 32 + (low >>> 0);
  }
}

const WHITEOUT = ".wh.";
const OPAQUE = ".wh..wh..opq";

/** A name as it is resolved below a root: no step leads out of that. */
const pathBelowRoot = (name: string): string => path.posix.join("/", name).replace(/^\/|\/$/g, "");

/**
 * A layer's entries as loaders unpack them: docker and podman over nothing but this layer, into
 * overlayfs and vfs, containerd likewise. Found out by trials of each case with docker 20.10,
 * podman 4.3 and containerd 1.6, and with both of their kinds of stores.
 */
class UnpackTrial {
  /** The first entry that stops a loader; one that stops all counts more. */
  odd: OddPath | undefined;
  readonly #paths = new PathTable();
  readonly #targets = new Map<string, string>();
  readonly #budget: LookBudget;
  #targetBytes = 0;

  constructor(budget: LookBudget) {
    this.#budget = budget;
  }

  take(header: TarHeader): void {
    if (this.odd?.kind === "odd-path") return;
    const kind = this.#kindOf(header);
    if (kind === "odd-path" || (kind && !this.odd)) this.odd = { kind, path: header.name };
  }

  #kindOf(header: TarHeader): OddPath["kind"] | undefined {
    const full = this.#paths.count > LIMITS.layerPaths || this.#targetBytes > LIMITS.layerLinkBytes;
    if (full || !isUnpackable(header)) return "odd-path";

    const given = pathBelowRoot(header.name);
    const folder = this.#follow(parentOf(given));
    if (folder === undefined) return "odd-path";
    const ofFolder = this.#enterFolder(folder, folder !== parentOf(given));
    const base = path.posix.basename(given);
    const place = folder === "" ? base : `${folder}/${base}`;
    const isTwice = (this.#paths.get(given) & ENTERED) !== 0;
    const ofEntry = base.startsWith(WHITEOUT)
      ? this.#remove(folder, base)
      : this.#put(place, header);

    this.#paths.set(given, this.#paths.get(given) | ENTERED);
    const kinds = [ofFolder, ofEntry, isTwice ? "path-twice" : undefined] as const;
    return kinds.find((kind) => kind === "odd-path") ?? kinds.find((kind) => kind);
  }

  /** A path and all that it lies below, from the top. */
  #foldersOf(place: string): string[] {
    const parts = place.split("/");
    this.#budget.spend(place.length * parts.length);
    return parts.map((_, at) => parts.slice(0, at + 1).join("/"));
  }

  #standsAt(place: string): number {
    return place === "" ? FOLDER : this.#paths.get(place) & ~ENTERED;
  }

  /** Where a path leads when links are followed, as far as it is there; undefined for a circle. */
  #follow(given: string): string | undefined {
    let place = given;
    for (let steps = 0; steps < 40 && place.length <= LIMITS.unpackedPathBytes; steps += 1) {
      const link = this.#targets.size > 0 ? this.#firstLink(place) : undefined;
      if (link === undefined) return place;
      const target = this.#targets.get(link) ?? "";
      const from = target.startsWith("/") ? "" : parentOf(link);
      place = pathBelowRoot(`${from}/${target}${place.slice(link.length)}`);
    }
    return undefined;
  }

  #firstLink(place: string): string | undefined {
    if (this.#standsAt(place) === FOLDER) return undefined;
    return this.#foldersOf(place).find((each) => this.#standsAt(each) === LINK);
  }

  /** Makes a folder with all above it, where that can be. */
  #enterFolder(folder: string, isBehindLink: boolean): OddPath["kind"] | undefined {
    const stands = this.#standsAt(folder);
    if (stands === FOLDER) return undefined;
    const folders = this.#foldersOf(folder);
    const isBelowFile = folders.some((each) => this.#standsAt(each) === FILE);
    const isBelowGone = folders.some((each) => this.#standsAt(each) === GONE);
    for (const each of folders) this.#paths.set(each, (this.#paths.get(each) & ENTERED) | FOLDER);
    if (isBelowFile) return "odd-path";
    return isBelowGone || isBehindLink ? "path-twice" : undefined;
  }

  /** A whiteout; overlayfs has room for one, or for what it takes away. */
  #remove(folder: string, base: string): OddPath["kind"] | undefined {
    if (base === OPAQUE) return undefined;
    const name = base.slice(WHITEOUT.length);
    if (["", ".", ".."].includes(name)) return "odd-path";
    const place = folder === "" ? name : `${folder}/${name}`;
    const before = this.#standsAt(place);
    this.#paths.set(place, (this.#paths.get(place) & ENTERED) | GONE);
    if (before === FOLDER) return "odd-path";
    return before === 0 ? undefined : "path-twice";
  }

  #put(place: string, { type, linkName }: TarHeader): OddPath["kind"] | undefined {
    if (place === "") return type === "5" ? undefined : "path-twice";
    const isGood = type !== "1" || this.#isFile(linkName, place);
    const before = this.#standsAt(place);
    const stands = { "5": FOLDER, "2": LINK }[type] ?? FILE;
    this.#paths.set(place, (this.#paths.get(place) & ENTERED) | stands);
    if (stands === LINK) {
      this.#targets.set(place, linkName);
      this.#targetBytes += place.length + linkName.length;
    }
    return isGood && (before !== FOLDER || stands === FOLDER) ? undefined : "odd-path";
  }

  /** Whether a hard link at a place leads to something that is no folder and stands elsewhere. */
  #isFile(linkName: string, place: string): boolean {
    const target = pathBelowRoot(linkName);
    const folder = this.#follow(parentOf(target));
    if (folder === undefined || target === "") return false;
    const base = path.posix.basename(target);
    const targetPlace = folder === "" ? base : `${folder}/${base}`;
    return targetPlace !== place && [FILE, LINK].includes(this.#standsAt(targetPlace));
  }
}

/** Whether bytes that go by are a tar, as loaders read and unpack one. */
class TarCheck {
  readonly #decoder = new TarDecoder();
  readonly #budget: LookBudget;
  #trial: UnpackTrial | undefined;
  #block: Buffer = Buffer.alloc(0);
  #contentBytes = 0;
  #paddingBytes = 0;
  #isBroken = false;

  constructor(budget: LookBudget) {
    this.#budget = budget;
  }

  push(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length && !this.#isBroken && !this.#decoder.isAtEnd) {
      const passed = this.#passOver(chunk.length - at);
      at += passed > 0 ? passed : this.#gather(chunk, at);
    }
  }

  isTar(): boolean {
    return !this.#isBroken && this.#contentBytes === 0 && this.#block.length === 0;
  }

  odd(): OddPath | undefined {
    const odd = this.#trial?.odd;
    if (odd || this.#decoder.globalHeaders < 2) return odd;
    return { kind: "path-twice", path: "pax_global_header" };
  }

  /** Content and padding of the entry before. */
  #passOver(availableBytes: number): number {
    const contentBytes = Math.min(this.#contentBytes, availableBytes);
    const paddingBytes = Math.min(this.#paddingBytes, availableBytes - contentBytes);
    this.#contentBytes -= contentBytes;
    this.#paddingBytes -= paddingBytes;
    return contentBytes + paddingBytes;
  }

  /** Says how many bytes it took. */
  #gather(chunk: Buffer, at: number): number {
    const missingBytes = this.#decoder.wantedBytes - this.#block.length;
    const piece = chunk.subarray(at, at + missingBytes);
    this.#block = this.#block.length === 0 ? piece : Buffer.concat([this.#block, piece]);
    if (piece.length === missingBytes) this.#takeBlock();
    return piece.length;
  }

  #takeBlock(): void {
    const recordsBefore = this.#decoder.recordCount;
    const header = this.#decode();
    const records = this.#decoder.recordCount - recordsBefore;
    this.#budget.spend(LIMITS.headerCostBytes + records * LIMITS.recordCostBytes);
    this.#block = Buffer.alloc(0);
    this.#contentBytes = header?.sizeBytes ?? 0;
    this.#paddingBytes = paddingOf(this.#contentBytes);
    if (!header) return;
    this.#isBroken = !UNPACKED_TYPES.includes(header.type);
    this.#trial ??= new UnpackTrial(this.#budget);
    this.#trial.take(header);
  }

  #decode(): TarHeader | undefined {
    try {
      return this.#decoder.take(this.#block);
    } catch (error) {
      if (!(error instanceof ImgpullError)) throw error;
      this.#isBroken = true;
      return undefined;
    }
  }
}

/**
 * A layer that is unpacked as it goes by. What follows after what is broken or without end is
 * passed over.
 */
class LayerUnpacking {
  readonly #packing: Packing;
  readonly #unpacker: Unpacker;
  readonly #digests: Digests;
  readonly #budget: LookBudget;
  readonly #tar: TarCheck;
  readonly #reading: Promise<Unpacked["outcome"]>;
  #packedBytes = 0;
  #isOver = false;

  constructor(
    packing: Packing,
    unpacker: Unpacker,
    algorithms: readonly string[],
    budget: LookBudget,
  ) {
    this.#packing = packing;
    this.#unpacker = unpacker;
    this.#digests = new Digests(algorithms);
    this.#budget = budget;
    this.#tar = new TarCheck(budget);
    unpacker.on("error", ignore); // what reads it meets it
    this.#reading = this.#read();
    this.#reading.catch(ignore); // `end` meets it
  }

  async write(piece: Buffer): Promise<void> {
    this.#packedBytes += piece.length;
    if (this.#isOver || this.#unpacker.write(piece)) return;
    await Promise.race([once(this.#unpacker, "drain").catch(ignore), this.#reading]);
  }

  async end(): Promise<Unpacked> {
    if (!this.#isOver) this.#unpacker.end();
    const outcome = await this.#reading;
    return {
      packing: this.#packing,
      outcome,
      digests: this.#digests.list(),
      isTar: this.#tar.isTar(),
      odd: this.#tar.odd(),
      hasRest: this.#unpacker.bytesWritten < this.#packedBytes,
    };
  }

  async #read(): Promise<Unpacked["outcome"]> {
    let unpackedBytes = 0;
    try {
      for await (const chunk of this.#unpacker as AsyncIterable<Buffer>) {
        unpackedBytes += chunk.length;
        if (isEndless(unpackedBytes, this.#packedBytes)) return "endless";
        this.#budget.spend(chunk.length);
        this.#digests.update(chunk);
        this.#tar.push(chunk);
      }
      return "whole";
    } catch (error) {
      if (!isUnpackError(error)) throw error;
      return "broken";
    } finally {
      this.#isOver = true;
    }
  }
}

// ------ The pass ------

/** What was seen of one file. */
type SeenFile = Readonly<{
  entry: TarEntry;
  /** False where the name has a digest, and it is not the content's. */
  isIntact: boolean;
  /** All of it, where it may be a document and was not left out. */
  bytes: Buffer | undefined;
  /** It is one document too many. */
  isLeftOut: boolean;
  /** Undefined where content was not asked for. */
  unpacked: Unpacked | undefined;
}>;

/** All that was seen of a tar. */
type TarContents = Readonly<{
  where: string;
  isFolder: boolean;
  packing: Packing | undefined;
  isOddlyPacked: boolean;
  names: TarNames;
  files: ReadonlyMap<string, SeenFile>;
  problems: readonly TarProblem[];
}>;

/** Files whose content is read whatever it begins with. */
const DOCUMENT_NAMES = ["index.json", "manifest.json", "oci-layout"];

/** One look at a source: what it has read, and which documents it has kept. */
class Look {
  readonly #source: OpenTarSource;
  readonly #budget: LookBudget;
  readonly #options: LookOptions;
  readonly #names = new TarNames();
  readonly #files = new Map<string, SeenFile>();
  readonly #problems: TarProblem[] = [];
  #keptBytes = 0;
  readonly #largeDocuments: string[] = []; // their names
  #doneBytes = 0;

  constructor(source: OpenTarSource, options: LookOptions) {
    this.#source = source;
    this.#budget = new LookBudget(source);
    this.#options = options;
  }

  /** Reads all, or only what may be a document. */
  async run(withContent: boolean): Promise<TarContents> {
    await this.#readMembers(withContent).catch((error: unknown) => {
      if (!(error instanceof ImgpullError) || error.code !== "BAD_TAR") throw error;
      const reason = error.message.replace(`${this.#source.where}: `, "");
      this.#problems.push({ kind: "unreadable", reason });
    });
    const isWhole = this.#problems.length === 0 && this.#names.entries.size > 0;
    const source = this.#source;
    if (isWhole && !source.hasTrailer())
      this.#problems.push({ kind: "cut-off", atByte: source.position() });
    return {
      where: source.where,
      isFolder: source.isFolder === true,
      packing: source.packing,
      isOddlyPacked: source.isOddlyPacked?.() === true,
      names: this.#names,
      files: this.#files,
      problems: this.#problems,
    };
  }

  async #readMembers(withContent: boolean): Promise<void> {
    const lanes = this.#source.isSeekable ? TUNING.unpackLanes : 1;
    const running = new Set<Promise<void>>();
    try {
      for await (const member of this.#source.members()) {
        this.#checkStopped();
        const { entry } = member;
        const problem = this.#names.add(entry);
        if (problem) this.#problems.push(problem);
        if (problem?.kind === "too-many-entries") return;
        if (problem || !"0S".includes(entry.type)) continue;

        const reading = this.#readMember(member, withContent);
        const run = reading.finally(() => running.delete(run));
        run.catch(ignore); // it is awaited below
        running.add(run);
        if (running.size >= lanes) await Promise.race(running);
      }
    } finally {
      settled(await Promise.allSettled(running));
    }
  }

  async #readMember(member: TarMember, withContent: boolean): Promise<void> {
    const { entry } = member;
    const seen = withContent ? await this.#inspect(member) : await this.#readDocument(member);
    const bytes = this.#kept(entry.name, seen.bytes);
    this.#files.set(entry.name, {
      entry: seen.entry,
      isIntact: seen.isIntact,
      bytes,
      isLeftOut: bytes === undefined && seen.bytes !== undefined,
      unpacked: seen.unpacked,
    });
  }

  /** A file of which only documents count. */
  async #readDocument({ entry, content }: TarMember): Promise<Omit<SeenFile, "isLeftOut">> {
    const seen = { entry, isIntact: true, unpacked: undefined };
    if (lengthOfEntry(entry) > LIMITS.tarMetadataBytes) return { ...seen, bytes: undefined };

    const pieces: Buffer[] = [];
    for await (const piece of content()) {
      this.#checkStopped();
      this.#budget.spend(piece.length + LIMITS.pieceCostBytes);
      if (pieces.length === 0 && !mayBeDocument(entry, piece)) break;
      pieces.push(piece);
    }
    return { ...seen, bytes: joinedDocument(pieces) };
  }

  /** A file that is hashed, and unpacked. */
  async #inspect({ entry, content }: TarMember): Promise<Omit<SeenFile, "isLeftOut">> {
    const inspection = new FileInspection(entry, this.#budget);
    for await (const piece of content()) {
      this.#checkStopped();
      await inspection.add(piece);
      this.#doneBytes += piece.length;
      this.#options.onProgress?.({
        doneBytes: this.#doneBytes,
        totalBytes: this.#source.sizeBytes,
      });
      if (inspection.isEndless()) break;
    }
    const { documentPieces, ...seen } = await inspection.end();
    return { ...seen, bytes: joinedDocument(documentPieces) };
  }

  /**
   * The bytes of a document, as long as all of them together are few enough to be kept. For a small
   * one large ones are let go: manifests and signatures are small, and an SBOM, which nobody asks
   * for here, is JSON too.
   */
  #kept(name: string, bytes: Buffer | undefined): Buffer | undefined {
    if (!bytes) return undefined;
    const sizeBytes = bytes.length;
    const isLarge = sizeBytes > LIMITS.tarSmallDocumentBytes;
    while (!isLarge && this.#keptBytes + sizeBytes > LIMITS.tarDocumentBytes) {
      const large = this.#largeDocuments.pop();
      const file = large === undefined ? undefined : this.#files.get(large);
      if (large === undefined) return undefined;
      if (!file?.bytes) continue;
      this.#keptBytes -= file.bytes.length;
      this.#files.set(large, { ...file, bytes: undefined, isLeftOut: true });
    }
    if (this.#keptBytes + sizeBytes > LIMITS.tarDocumentBytes) return undefined;

    this.#keptBytes += sizeBytes;
    if (isLarge) this.#largeDocuments.push(name);
    return bytes;
  }

  #checkStopped(): void {
    const { signal } = this.#options;
    if (signal?.aborted) stopped(signal.reason);
  }
}

/**
 * One file as it goes by: it is hashed, unpacked where it is compressed, and kept where it may be a
 * document.
 */
class FileInspection {
  readonly #entry: TarEntry;
  readonly #claimed: string | undefined;
  readonly #algorithms: readonly string[];
  readonly #digests: Digests;
  readonly #budget: LookBudget;
  readonly #tar: TarCheck;
  readonly #documentPieces: Buffer[] = [];
  #isDocument = false;
  #packing: Packing | undefined;
  #unpacking: LayerUnpacking | undefined;
  #readBytes = 0;

  constructor(entry: TarEntry, budget: LookBudget) {
    this.#entry = entry;
    this.#budget = budget;
    this.#tar = new TarCheck(budget);
    this.#claimed = digestInName(entry.name);
    this.#algorithms = [...new Set([algorithmOf(this.#claimed ?? "sha256:"), "sha256"])];
    this.#digests = new Digests(this.#algorithms);
  }

  async add(piece: Buffer): Promise<void> {
    if (this.#readBytes === 0) this.#begin(piece);
    this.#readBytes += piece.length;
    if (!this.isEndless()) this.#budget.spend(piece.length + LIMITS.pieceCostBytes);
    this.#digests.update(piece);
    if (this.#isDocument) this.#documentPieces.push(piece);
    if (!this.#packing) this.#tar.push(piece);
    await this.#unpacking?.write(piece);
  }

  /** A file with holes may be longer than all that there is. */
  isEndless(): boolean {
    return isEndless(this.#readBytes, this.#entry.sizeBytes);
  }

  async end() {
    const hashed = this.#digests.list();
    // one string for both: a tar may have a hundred thousand files
    const digests = hashed.map((digest) => (digest === this.#claimed ? this.#claimed : digest));
    const unpacked = (await this.#unpacking?.end()) ?? this.#asItIs(digests);
    return {
      entry: this.#entry,
      isIntact: this.#claimed === undefined || digests.includes(this.#claimed),
      unpacked,
      documentPieces: this.#documentPieces,
    };
  }

  #begin(firstPiece: Buffer): void {
    this.#isDocument = mayBeDocument(this.#entry, firstPiece);
    this.#packing = packingOf(firstPiece);
    const unpacker = this.#packing && unpackerFor(this.#packing, this.#entry.sizeBytes);
    if (this.#packing && unpacker)
      this.#unpacking = new LayerUnpacking(this.#packing, unpacker, this.#algorithms, this.#budget);
  }

  /** What was not unpacked: it is plain, or compressed in a way that is not known here. */
  #asItIs(digests: readonly string[]): Unpacked {
    const outcome = this.#packing ? "not-unpacked" : "whole";
    return {
      packing: this.#packing,
      outcome: this.isEndless() ? "endless" : outcome,
      digests,
      isTar: this.#tar.isTar(),
      odd: this.#tar.odd(),
      hasRest: false,
    };
  }
}

const joinedDocument = (pieces: readonly Buffer[]): Buffer | undefined =>
  pieces.length === 0 ? undefined : Buffer.concat(pieces);

/** By its name, or since it begins as JSON does. */
function mayBeDocument(entry: TarEntry, firstPiece: Buffer): boolean {
  if (lengthOfEntry(entry) > LIMITS.tarMetadataBytes) return false;
  const beginning = firstPiece.toString("latin1", 0, 64).trimStart();
  return (
    DOCUMENT_NAMES.includes(entry.name) || beginning.startsWith("{") || beginning.startsWith("[")
  );
}

// ------ Documents ------

/**
 * How many of the platforms that an index names are here, and how many manifests, attestations too,
 * are not.
 */
type PlatformCount = Readonly<{
  here: number;
  named: number;
  absentManifests: number;
  /** Of an index of images 1, of an index in an index 2. */
  depth: number;
}>;

/** What the tar holds that a delta was made since. */
class BaseTar {
  readonly #files = new Map<string, SeenFile>();
  /** The layers of each image that docker loads from it, from the bottom. */
  readonly #chains: readonly (readonly string[])[];

  constructor(contents: TarContents) {
    for (const seen of contents.files.values()) {
      const digest = digestInName(seen.entry.name);
      if (digest !== undefined && seen.isIntact) this.#files.set(digest, seen);
    }
    this.#chains = chainsOf(new TarDocuments(contents).json("manifest.json"));
  }

  layer(name: string): SeenFile | undefined {
    const digest = digestInName(name);
    return digest === undefined ? undefined : this.#files.get(digest);
  }

  /**
   * Whether docker has these layers when it has loaded the base: it knows each by all those below
   * it.
   */
  hasChain(layers: readonly string[]): boolean {
    return this.#chains.some((chain) =>
      layers.every((layer, at) => digestInName(layer) === chain[at]),
    );
  }
}

/**
 * The manifests, indexes and configs of a tar: each is parsed once, and what is wrong with it is
 * said once.
 */
class TarDocuments {
  readonly problems: TarProblem[] = [];
  readonly #contents: TarContents;
  readonly #manifests = new Map<
    string,
    Readonly<{ mediaType: string; manifest: ImageManifest | IndexManifest | undefined }>
  >();
  readonly #configs = new Map<string, ConfigWords | undefined>();
  readonly #platforms = new Map<string, PlatformCount>();
  readonly #encrypted = new Set<string>();
  /** Of a delta. */
  readonly base: BaseTar | undefined;

  constructor(contents: TarContents, base?: BaseTar) {
    this.#contents = contents;
    this.base = base;
  }

  /** What it is as a whole. */
  get form(): Pick<TarContents, "where" | "isFolder" | "packing" | "isOddlyPacked"> {
    return this.#contents;
  }

  /** The bytes under a digest, where they have it. */
  bytes(digest: string): Buffer | undefined {
    const seen = this.file(blobPath(digest));
    // A link leads to what is intact under a name of its own.
    const isIt = seen?.isIntact && digestInName(seen.entry.name) === digest;
    return isIt ? seen.bytes : undefined;
  }

  /** The file behind a name, links followed. */
  file(name: string): SeenFile | undefined {
    const entry = this.#contents.names.file(name);
    return entry && this.#contents.files.get(entry.name);
  }

  /** A layer, which may be the base's. */
  layer(name: string): SeenFile | undefined {
    return this.file(name) ?? this.base?.layer(name);
  }

  /** What stands under a name: "0" a file, "1" a hard link, "2" a symbolic one. */
  typeOf(name: string): string | undefined {
    return this.#contents.names.entries.get(resolveName(name))?.type;
  }

  /** In the order of the tar. */
  entries(): IterableIterator<TarEntry> {
    return this.#contents.names.entries.values();
  }

  /** manifest.json does not say of a layer that it is encrypted: a manifest does. */
  isEncrypted(name: string): boolean {
    return this.#encrypted.has(resolveName(name));
  }

  markEncrypted(name: string): void {
    this.#encrypted.add(name);
  }

  /**
   * The JSON of a file; undefined where it is not there, is damaged (which is said elsewhere) or is
   * no JSON.
   */
  json(name: string): unknown {
    const seen = this.file(name);
    if (!seen?.isIntact) return undefined;
    if (lengthOfEntry(seen.entry) > LIMITS.tarMetadataBytes)
      return this.#refuse(name, "is too large");
    const parsed = seen.bytes && parseShallowJson(seen.bytes);
    if (parsed !== undefined) return parsed;
    return this.#refuse(name, seen.isLeftOut ? NOT_KEPT : NOT_JSON);
  }

  /** The JSON of a file that no digest vouches for: every reader has to read the same in it. */
  plainJson(name: string): unknown {
    const json = this.json(name);
    const bytes = json === undefined ? undefined : this.file(name)?.bytes;
    if (!bytes || !hasClashingKeys(bytes)) return json;
    return this.#refuse(name, "has two keys in one object that some readers take for the same");
  }

  /** A manifest or index; undefined where it is not there, or something is wrong with it. */
  manifest({ digest, size, mediaType }: Descriptor): ImageManifest | IndexManifest | undefined {
    const bytes = this.bytes(digest);
    if (bytes && bytes.length !== size) {
      const sizes = { expectedBytes: size, actualBytes: bytes.length };
      this.problems.push({ kind: "size", entry: blobPath(digest), ...sizes });
      return undefined;
    }
    const known = this.#manifests.get(digest);
    if (known && known.mediaType !== mediaType)
      return this.#refuse(blobPath(digest), "is said to be of two types");
    if (known) return known.manifest;
    const manifest = this.#readManifest(digest, mediaType);
    this.#manifests.set(digest, { mediaType, manifest });
    return manifest;
  }

  /**
   * How much of an index is here: docker save, too, keeps an index and leaves platforms out.
   * Undefined for an image.
   */
  platformsOf(descriptor: Descriptor, depth = 0): PlatformCount | undefined {
    const known = this.#platforms.get(descriptor.digest);
    const manifest = depth > LIMITS.indexDepth ? undefined : this.manifest(descriptor);
    if (known || manifest?.kind !== "index") return known;

    const counts = { here: 0, named: 0, absentManifests: 0, depth: 1 };
    this.#platforms.set(descriptor.digest, counts);
    for (const child of manifest.manifests) {
      const isHere = this.file(blobPath(child.digest)) !== undefined;
      const isManifest = isManifestType(child);
      const inner = isHere && isManifest ? this.platformsOf(child, depth + 1) : undefined;
      const isPlatform = inner === undefined && isManifest && !isAttestation(child);
      counts.depth = Math.max(counts.depth, 1 + (inner?.depth ?? 0));
      counts.here += inner?.here ?? Number(isPlatform && isHere);
      counts.named += inner?.named ?? Number(isPlatform);
      counts.absentManifests += inner?.absentManifests ?? Number(!isHere);
    }
    return counts;
  }

  /** Undefined where it is not there or no JSON. */
  config(name: string): ConfigWords | undefined {
    if (!this.#configs.has(name)) this.#configs.set(name, this.#readConfig(name));
    return this.#configs.get(name);
  }

  #readManifest(digest: string, mediaType: string): ImageManifest | IndexManifest | undefined {
    const name = blobPath(digest);
    const json = this.json(name);
    const bytes = this.bytes(digest);
    if (json === undefined || !bytes) return undefined;
    if (sniffMediaType(bytes, mediaType) !== mediaType)
      return this.#refuse(name, "is of another type");
    return this.attempt(name, () => parseManifest({ digest, mediaType, bytes }, name));
  }

  #readConfig(name: string): ConfigWords | undefined {
    const json = this.json(name);
    return json === undefined ? undefined : configWords(json);
  }

  /** Runs what refuses by an error, and keeps its reason. */
  attempt<T>(entry: string, run: () => T): T | undefined {
    try {
      return run();
    } catch (error) {
      if (!(error instanceof ImgpullError)) throw error;
      const reason = unmarked(error.message).replace(`${entry}: `, "");
      this.problems.push({ kind: "malformed", entry, reason });
      return undefined;
    }
  }

  #refuse(entry: string, reason: string): undefined {
    this.problems.push({ kind: "document", entry, reason });
  }
}

const NOT_KEPT = "is one document too many to be held at once";
const NOT_JSON = "is not JSON, or nested too deep or too large to be read";

/**
 * Whether an object in a JSON text has a key twice, or in two cases: Go's parser, which loaders
 * use, takes `Digest` for `digest` and the last of several, and joins what is an object in both.
 * The text is valid JSON.
 */
function hasClashingKeys(json: Buffer): boolean {
  const keys: (Set<string> | undefined)[] = []; // of the objects and lists that are open
  let isKeyNext = false;

  for (let at = 0; at < json.length; at += 1) {
    const byte = json[at];
    if (byte === OPEN_BRACE) keys.push(new Set());
    if (byte === OPEN_BRACKET) keys.push(undefined);
    if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) keys.pop();
    if (byte === OPEN_BRACE || byte === COMMA) isKeyNext = true;
    if (byte !== QUOTE) continue;

    const start = at;
    at = endOfString(json, start);
    const known = keys.at(-1);
    if (!known || !isKeyNext) continue;
    isKeyNext = false;
    const key = foldCase(String(parseJson(json.subarray(start, at + 1))));
    if (known.has(key)) return true;
    known.add(key);
  }
  return false;
}

/** As Go folds it: the Kelvin sign is a k, and a long s an s. */
const foldCase = (text: string): string => text.toUpperCase().toLowerCase();

// ------ Images ------

/** A file that an image is made of. */
type HeldPart = Readonly<{ entry: string; size: number; mediaType: string }>;

/** An image or other content that a tar names: config first, then layers. */
type HeldImage = Readonly<{
  name: string;
  /** Of the index that leads to it, where one does. */
  platforms?: PlatformCount | undefined;
  /** Empty where only manifest.json names it. */
  digest: string;
  platform: string;
  /** What loaders take for an image. */
  isImage: boolean;
  /** Its config should have a diff_id for each layer. */
  hasDiffIds: boolean;
  config: ConfigWords | undefined;
  parts: readonly HeldPart[];
}>;

/** What an entry of index.json says beside its descriptor. */
type IndexEntry = Readonly<{
  descriptor: Descriptor;
  name: string;
  /** The name by which skopeo finds it. */
  refName: string;
  /** No image, but what refers to one, or the index that this proof is of. */
  isCompanion: boolean;
}>;

/** What it leads to besides. */
type HeldEntry = IndexEntry &
  Readonly<{
    images: readonly Omit<HeldImage, "name">[];
    platforms: PlatformCount | undefined;
  }>;

/** An entry of manifest.json, with its RepoTags as they stand there. */
type ListedImage = HeldImage & Readonly<{ tags: readonly string[] }>;

/** What a tar names: by index.json, and by manifest.json. */
type HeldImages = Readonly<{
  entries: readonly HeldEntry[];
  indexed: readonly HeldImage[];
  /** Signatures, SBOMs and the like, which count as no image. */
  companions: readonly HeldImage[];
  listed: readonly ListedImage[];
  /** Blobs that an index names as they are, such as a build's cache. */
  blobs: readonly HeldPart[];
  /** Of each index that is no proof. */
  indexes: readonly PlatformCount[];
  isLayout: boolean;
}>;

class ImageFinder {
  readonly problems: TarProblem[] = [];
  readonly #documents: TarDocuments;
  readonly #blobs = new Map<string, HeldPart>();
  /** What each entry of index.json leads to, by its digest: equal entries are read once. */
  readonly #found = new Map<string, readonly Omit<HeldImage, "name">[]>();
  #namedBlobs = 0;
  #references = 0;

  constructor(documents: TarDocuments) {
    this.#documents = documents;
  }

  run(): HeldImages {
    const entries = this.#readIndex().map((entry): HeldEntry => {
      const images = this.#imagesOf(entry.descriptor);
      const platforms = this.#documents.platformsOf(entry.descriptor);
      return { ...entry, images, platforms };
    });
    const found = entries.flatMap(({ name, isCompanion, platforms, images }) =>
      images.map((image) => ({ name, isCompanion, platforms, ...image })),
    );
    const indexes = new Map(
      entries
        .filter(({ isCompanion }) => !isCompanion)
        .map(({ descriptor }) => [descriptor.digest, this.#documents.platformsOf(descriptor)]),
    );
    const listed = this.#readDockerList();
    const isLayout = this.#checkLayout(entries.length > 0, listed.length > 0);
    const isEmpty = entries.every(({ isCompanion }) => isCompanion) && listed.length === 0;
    const isSaid = this.problems.length + this.#documents.problems.length > 0;
    if (isEmpty && !isSaid) this.problems.push({ kind: "no-image" });

    return {
      entries,
      indexed: found.filter(({ isCompanion }) => !isCompanion),
      companions: found.filter(({ isCompanion }) => isCompanion),
      listed,
      blobs: [...this.#blobs.values()],
      indexes: [...indexes.values()].filter((index) => index !== undefined),
      isLayout,
    };
  }

  #readIndex(): IndexEntry[] {
    const json = this.#documents.plainJson("index.json");
    if (json === undefined) return [];
    if (!isRecord(json) || !Array.isArray(json.manifests)) {
      this.problems.push({ kind: "document", entry: "index.json", reason: "is not an index" });
      return [];
    }

    const entries: IndexEntry[] = [];
    for (const value of json.manifests as unknown[]) {
      const descriptor = this.#documents.attempt("index.json", () =>
        parseDescriptor(value, "index.json"),
      );
      if (!descriptor || !this.#count(1)) break; // one that is wrong is reason enough
      const annotations = isRecord(value) && isRecord(value.annotations) ? value.annotations : {};
      const names = NAME_KEYS.map((key) => annotations[key]);
      const name = names.find((each) => typeof each === "string" && each !== "") ?? "";
      const refName = typeof names[1] === "string" ? names[1] : "";
      const isNameless = names.every((each) => each === undefined || each === "");
      const isAlone = json.manifests.length === 1;
      const isCompanion = isNameless && this.#isProof(descriptor, annotations, isAlone);
      entries.push({ descriptor, name: printable(String(name)), refName, isCompanion });
    }
    return entries;
  }

  /**
   * An entry that stands alone is loaded by podman and skopeo, whatever it says that it refers to.
   */
  #isProof(
    descriptor: Descriptor,
    annotations: Readonly<Record<string, unknown>>,
    isAlone: boolean,
  ): boolean {
    const hasSubject = typeof annotations[SUBJECT_KEY] === "string";
    if (hasSubject && !isAlone) return true;
    if (!hasSubject && !isCosignProof(annotations)) return false;
    return !this.#imagesOf(descriptor).some(({ isImage }) => isImage);
  }

  /** The images that an entry of index.json leads to, attestations last. */
  #imagesOf(descriptor: Descriptor): readonly Omit<HeldImage, "name">[] {
    const { digest } = descriptor;
    const known = this.#found.get(digest);
    if (known) {
      this.#count(sumOf(known, ({ parts }) => parts.length));
      return known;
    }

    const images: Omit<HeldImage, "name">[] = [];
    const seen = new Set<string>();
    const blobsBefore = this.#namedBlobs;
    this.#found.set(digest, images);
    if (!this.#documents.file(blobPath(digest)))
      this.problems.push({ kind: "missing", entry: blobPath(digest) });
    else this.#collect(descriptor, 0, seen, images);

    images.sort((left, right) => Number(isUnknown(left)) - Number(isUnknown(right)));
    const isRead = this.#documents.manifest(descriptor) !== undefined;
    const isEmpty = isRead && images.length === 0 && this.#namedBlobs === blobsBefore;
    if (isEmpty) this.problems.push({ kind: "nothing-here", entry: blobPath(digest) });
    return images;
  }

  #collect(
    descriptor: Descriptor,
    depth: number,
    seen: Set<string>,
    images: Omit<HeldImage, "name">[],
  ): void {
    const { digest, platform } = descriptor;
    const entry = blobPath(digest);
    if (seen.has(digest) || !this.#count(1)) return;
    seen.add(digest);
    if (depth > LIMITS.indexDepth) {
      const reason = `indexes inside indexes, more than ${LIMITS.indexDepth} deep`;
      this.problems.push({ kind: "malformed", entry, reason });
      return;
    }

    const manifest = this.#documents.manifest(descriptor);
    if (manifest?.kind === "image") {
      const image = this.#describe(manifest, platform);
      if (image) images.push({ digest, ...image });
    }
    if (manifest?.kind !== "index") return;

    for (const child of manifest.manifests) {
      const isThere = this.#documents.file(blobPath(child.digest)) !== undefined;
      if (!isThere) continue;
      if (isManifestType(child)) this.#collect(child, depth + 1, seen, images);
      else this.#addBlob(child);
    }
  }

  #addBlob(child: Descriptor): void {
    this.#namedBlobs += 1;
    this.#blobs.set(child.digest, partOf(child));
  }

  #describe(manifest: ImageManifest, stated?: Platform) {
    const { config, layers } = manifest;
    if (!this.#count(layers.length + 1)) return undefined;
    const hasImageConfig = CONFIG_TYPES.includes(config.mediaType);
    const words = hasImageConfig ? this.#documents.config(blobPath(config.digest)) : undefined;
    for (const { digest, mediaType } of layers)
      if (mediaType.endsWith("+encrypted")) this.#documents.markEncrypted(blobPath(digest));
    const platform = words ? words.platform : formatPlatform(stated);
    return {
      platform,
      config: words,
      isImage: isImage(manifest, words),
      hasDiffIds: needsDiffIds(words, claimsImage(manifest), layers.length),
      parts: [config, ...layers].map(partOf),
    };
  }

  /** The images of manifest.json, the list of `docker load`. */
  #readDockerList(): ListedImage[] {
    const json = this.#documents.plainJson("manifest.json") ?? [];
    const images: ListedImage[] = [];
    for (const value of Array.isArray(json) ? json : [json]) {
      const entry = parseDockerEntry(value);
      if (!entry) {
        const reason = "is not as docker save makes it";
        this.problems.push({ kind: "document", entry: "manifest.json", reason });
        break;
      }
      if (!this.#count(entry.layers.length + 1)) break;

      const parts = [entry.config, ...entry.layers].map((name) => {
        const file = this.#documents.layer(name);
        return { entry: name, size: file ? lengthOfEntry(file.entry) : 0, mediaType: "" };
      });
      const config = this.#documents.config(entry.config);
      const layerCount = entry.layers.length;
      const platform = config?.platform ?? "";
      images.push({
        name: printable(entry.tags.join(" ")),
        tags: entry.tags,
        digest: "",
        platform,
        config,
        isImage: config !== undefined && hasOneDiffIdEach(config, layerCount),
        hasDiffIds: needsDiffIds(config, true, layerCount),
        parts,
      });
    }
    return images;
  }

  #checkLayout(hasIndex: boolean, hasList: boolean): boolean {
    const layout = this.#documents.json("oci-layout");
    const isRight = hasIndex && isRecord(layout) && layout.imageLayoutVersion === "1.0.0";
    if (layout !== undefined && !isRight && (hasIndex || hasList)) {
      const reason = "is there, but not of version 1.0.0 and with an index.json";
      this.problems.push({ kind: "document", entry: "oci-layout", reason });
    }
    return isRight;
  }

  /** False where all images together name more than can be looked at. */
  #count(references: number): boolean {
    const isFirst = this.#references <= LIMITS.tarReferences;
    this.#references += references;
    if (this.#references <= LIMITS.tarReferences) return true;
    if (isFirst) this.problems.push({ kind: "too-many-references" });
    return false;
  }
}

/**
 * What cosign marks as such, and docker before 29.1 lists as an image without a name if it is one.
 */
const isCosignProof = ({ kind }: Readonly<Record<string, unknown>>): boolean =>
  COSIGN_TAGS.some((tag) => tag.kind !== undefined && tag.kind === kind);

const isUnknown = ({ platform }: { platform: string }): boolean => platform.startsWith("unknown");

const partOf = ({ digest, size, mediaType }: Descriptor): HeldPart => ({
  entry: blobPath(digest),
  size,
  mediaType,
});

/**
 * Not those of what only has an image's config type: an empty config, as oras makes it, says
 * nothing at all.
 */
function needsDiffIds(
  config: ConfigWords | undefined,
  isClaimed: boolean,
  layerCount: number,
): boolean {
  if (!config) return false;
  if (config.diffIds !== undefined) return true;
  return isClaimed && layerCount > 0 && config.platform !== "" && !isUnknown(config);
}

// ------ Checking what images are made of ------

/**
 * Every file that an image names is there, has the size that it states, and unpacks to its diff_id.
 */
class PartCheck {
  readonly problems: TarProblem[] = [];
  readonly notUnpacked = new Map<string, number>();
  unpackedLayers = 0;
  readonly layersOfBase = new Set<string>();
  readonly #documents: TarDocuments;
  /** Each pair of a file and a diff_id is compared once. */
  readonly #compared = new Set<string>();

  constructor(documents: TarDocuments) {
    this.#documents = documents;
  }

  checkImage({ parts, config, hasDiffIds }: HeldImage): void {
    const layerCount = parts.length - 1;
    const hasRightIds = config !== undefined && hasOneDiffIdEach(config, layerCount);
    if (hasDiffIds && !hasRightIds)
      this.problems.push({ kind: "diff-ids", entry: parts[0]?.entry ?? "" });

    for (const [at, part] of parts.entries()) {
      const seen = this.checkPart(part, at > 0);
      const diffId = at > 0 && hasRightIds ? String(config.diffIds?.[at - 1]) : undefined;
      if (seen && diffId) this.#compare(seen, part, diffId);
    }
  }

  checkPart({ entry, size }: HeldPart, isLayer = false): SeenFile | undefined {
    const own = this.#documents.file(entry);
    const seen = own ?? (isLayer ? this.#documents.layer(entry) : undefined);
    if (seen && !own) this.layersOfBase.add(resolveName(entry));
    if (!seen) {
      this.problems.push({ kind: "missing", entry });
      return undefined;
    }
    const actualBytes = lengthOfEntry(seen.entry);
    if (actualBytes === size) return seen;
    this.problems.push({ kind: "size", entry, expectedBytes: size, actualBytes });
    return undefined;
  }

  #compare(seen: SeenFile, { entry }: HeldPart, diffId: string): void {
    const name = seen.entry.name;
    const key = `${name} ${diffId}`;
    if (!seen.isIntact || !seen.unpacked || this.#compared.has(key)) return;
    this.#compared.add(key);

    const { outcome, packing, digests, hasRest } = seen.unpacked;
    const isSame = digests.includes(diffId);
    const isOtherAlgorithm = !digests.some((each) => algorithmOf(each) === algorithmOf(diffId));
    // Before Node 26 the first of several zstd frames is the last (nodejs/node#64741).
    const isPartial = packing === "zstd" && outcome === "whole" && hasRest;
    if (outcome === "endless") return; // which is said of the file
    if (this.#documents.isEncrypted(entry)) this.#skip("encrypted");
    else if (outcome === "whole" && isSame) this.unpackedLayers += 1;
    else if (outcome === "not-unpacked" || isPartial) this.#skip(packing ?? "unknown");
    else if (isOtherAlgorithm) this.#skip(algorithmOf(diffId));
    else this.problems.push({ kind: "diff-id", entry: name, diffId });
  }

  #skip(reason: string): void {
    this.notUnpacked.set(reason, (this.notUnpacked.get(reason) ?? 0) + 1);
  }
}

// ------ Judging loaders ------

// Tried with docker 20.10, podman 4.3, containerd 1.6 and skopeo 1.9, on tars that have one of
// these faults each.

/** docker's layer store is no deeper. */
const MOST_DOCKER_LAYERS = 125;

/** These take a tar that is compressed as a whole. */
const UNPACKS: Readonly<Partial<Record<Packing, readonly TarLoader["program"][]>>> = {
  gzip: ["docker", "podman", "skopeo oci-archive"],
  zstd: ["podman", "skopeo docker-archive", "skopeo oci-archive"],
};

class LoaderJudge {
  readonly #held: HeldImages;
  readonly #documents: TarDocuments;
  readonly #isRooted: boolean;

  constructor(held: HeldImages, documents: TarDocuments) {
    this.#held = held;
    this.#documents = documents;
    this.#isRooted = [...documents.entries()].some(({ isRooted }) => isRooted);
  }

  run(): TarLoader[] {
    const { entries, listed } = this.#held;
    const ofArchive = this.#faultsOfArchive();
    const ofLayout = this.#faultsOfLayout();
    if (this.#documents.form.isFolder)
      return [
        this.#verdict("podman", this.#faultsOfPodmanFolder(), { zstdSince: 4 }),
        this.#verdict("skopeo oci", ofLayout, { needsName: entries.length > 1 }),
      ];

    const isForPodman =
      this.#faultsOfPodmanArchive().length === 0 || this.#faultsOfPodmanLayout().length === 0;
    const ofPodman =
      listed.length > 0 ? this.#faultsOfPodmanArchive() : this.#faultsOfPodmanLayout();
    return [
      this.#verdict("docker", this.#faultsOfDocker(), { zstdSince: 23 }),
      this.#verdict("podman", isForPodman ? [] : ofPodman, { zstdSince: 4 }),
      this.#verdict("ctr", this.#faultsOfContainerd()),
      this.#verdict("skopeo docker-archive", ofArchive, { needsName: listed.length > 1 }),
      this.#verdict("skopeo oci-archive", ofLayout, { needsName: entries.length > 1 }),
    ];
  }

  #verdict(
    program: TarLoader["program"],
    faults: LoaderFault[],
    { zstdSince, needsName }: { zstdSince?: number; needsName?: boolean } = {},
  ): TarLoader {
    const reasons = [...faults, ...this.#faultsOfPacking(program)];
    const takes = reasons.length === 0;
    const sinceVersion = takes && this.#hasZstd() ? zstdSince : undefined;
    return {
      program,
      takes,
      ...(sinceVersion !== undefined && { sinceVersion }),
      ...(needsName !== undefined && { needsName }),
      reasons,
    };
  }

  #faultsOfPacking(program: TarLoader["program"]): LoaderFault[] {
    const { packing, isOddlyPacked } = this.#documents.form;
    if (packing === undefined) return [];
    const isUnpacked = UNPACKS[packing]?.includes(program) === true && !isOddlyPacked;
    return isUnpacked ? [] : [{ kind: "compressed" }];
  }

  #hasZstd(): boolean {
    const { indexed, listed } = this.#held;
    const layers = [...indexed, ...listed].flatMap(({ parts }) => parts.slice(1));
    return layers.some(
      (part) => part.mediaType.includes("zstd") || this.#unpacked(part)?.packing === "zstd",
    );
  }

  #unpacked({ entry }: HeldPart): Unpacked | undefined {
    return this.#documents.layer(entry)?.unpacked;
  }

  /** It loads all that manifest.json lists, or nothing. */
  #faultsOfDocker(): LoaderFault[] {
    const { listed } = this.#held;
    if (listed.length === 0) return [{ kind: "no-manifest-json" }];
    const faults = listed.flatMap((image) => this.#faultsOfImage(image));
    for (const { platform, parts } of listed) {
      const entry = parts[0]?.entry ?? "";
      if (platform.startsWith("windows")) faults.push({ kind: "windows", entry });
      if (parts.length - 1 > MOST_DOCKER_LAYERS) faults.push({ kind: "too-many-layers", entry });
    }
    const ofUnpacking = faultsOfUnpacking(this.#documents.entries());
    return [...faults, ...this.#faultsOfTags(), ...this.#faultsOfBase(), ...ofUnpacking];
  }

  /** What is left out must stand at the bottom of an image of the base, in the same order. */
  #faultsOfBase(): LoaderFault[] {
    return this.#held.listed.flatMap(({ parts }) => {
      const layers = parts.slice(1).map(({ entry }) => entry);
      const last = layers.findLastIndex((layer) => this.#documents.file(layer) === undefined);
      const isThere = last < 0 || this.#documents.base?.hasChain(layers.slice(0, last + 1));
      return isThere ? [] : [{ kind: "not-at-bottom" as const, entry: layers[last] ?? "" }];
    });
  }

  #faultsOfTags(): LoaderFault[] {
    const isRight = this.#held.listed.every(({ tags }) => tags.every(isTaggedName));
    return isRight ? [] : [{ kind: "bad-name", entry: "manifest.json" }];
  }

  /** podman tries the tar as an OCI archive of one image, and as docker's. */
  #faultsOfPodmanArchive(): LoaderFault[] {
    const { listed } = this.#held;
    if (listed.length === 0) return [{ kind: "no-manifest-json" }];
    if (this.#documents.form.packing === "gzip") return [{ kind: "compressed" }];
    const faults = listed.flatMap((image) => this.#faultsOfImage(image));
    const ofLinks = this.#faultsOfLinks(listed.flatMap(namesOfParts), "1");
    return [...faults, ...this.#faultsOfTags(), ...ofLinks, ...this.#faultsOfNames()];
  }

  /** It calls the image after the folder. */
  #faultsOfPodmanFolder(): LoaderFault[] {
    const entry = path.resolve(this.#documents.form.where);
    const isName = isReference(`localhost${entry}:latest`);
    return [
      ...this.#faultsOfPodmanLayout(),
      ...(isName ? [] : [{ kind: "folder-name" as const, entry }]),
    ];
  }

  #faultsOfPodmanLayout(): LoaderFault[] {
    const { entries, isLayout } = this.#held;
    const [entry] = entries;
    if (!isLayout || !entry) return [{ kind: "no-layout" }];
    if (entries.length > 1) return [{ kind: "several" }];
    const images = entry.images.filter((image) => !isUnknown(image));
    const ofImages = images.flatMap((image) => this.#faultsOfImage(image));
    return [...faultsOfTree(entry), ...ofImages, ...this.#faultsOfUnpackingLayout()];
  }

  /**
   * It goes by index.json, or by manifest.json where there is no layout; it unpacks each image that
   * has a name.
   */
  #faultsOfContainerd(): LoaderFault[] {
    const { entries, listed, isLayout } = this.#held;
    if (!isLayout && listed.length === 0) return [{ kind: "no-layout" }];
    const named = entries.filter(({ name, isCompanion }) => name !== "" && !isCompanion);
    const tagged = listed.filter(({ tags }) => tags.length > 0);
    if ((isLayout ? named : tagged).length === 0) return [{ kind: "no-name" }];

    const images = isLayout ? named.flatMap(({ images }) => images) : tagged;
    const unpacked = images.filter((image) => !isUnknown(image));
    const faults = unpacked
      .flatMap((image) => this.#faultsOfImage(image))
      .filter(({ kind }) => kind !== "path-twice");
    const parts = unpacked.flatMap((image) => image.parts.slice(1));
    faults.push(...parts.flatMap((part) => this.#faultsOfLabel(part)));

    const names = images.flatMap(namesOfParts);
    const ofList = isLayout ? faultsOfSameName(named) : this.#faultsOfTags();
    const ofLinks = isLayout
      ? this.#faultsOfLinks([...DOCUMENT_NAMES, ...names], "12")
      : this.#faultsOfLinks(names, "1");
    return [...faults, ...ofList, ...ofLinks, ...this.#faultsOfNames()];
  }

  /** Of the names, those that are links of these types. */
  #faultsOfLinks(names: readonly string[], types: string): LoaderFault[] {
    const links = [...new Set(names)].filter((name) => {
      const type = this.#documents.typeOf(name);
      return type !== undefined && types.includes(type);
    });
    return links.map((entry) => ({ kind: "link", entry }));
  }

  #faultsOfArchive(): LoaderFault[] {
    const { listed } = this.#held;
    if (listed.length === 0) return [{ kind: "no-manifest-json" }];
    const isNameless = listed.length > 1 && listed.some(({ tags }) => tags.length === 0);
    const faults: LoaderFault[] = isNameless ? [{ kind: "no-name" }] : [];
    for (const image of listed) {
      const ofImage = this.#faultsOfImage(image);
      faults.push(...ofImage.filter(({ kind }) => !OF_UNPACKING.includes(kind)));
    }
    const names = ["manifest.json", ...listed.flatMap(namesOfParts)];
    return [...faults, ...this.#faultsOfLinks(names, "1"), ...this.#faultsOfNames()];
  }

  /** It finds one entry without a name, and several by their names if their types are OCI's. */
  #faultsOfLayout(): LoaderFault[] {
    const { entries, isLayout } = this.#held;
    if (!isLayout) return [{ kind: "no-layout" }];
    const ofUnpacking = this.#faultsOfUnpackingLayout();
    if (entries.length === 1) return [...entries.flatMap(faultsOfTree), ...ofUnpacking];
    const ofEntries = entries
      .filter(({ isCompanion }) => !isCompanion)
      .flatMap((entry) => {
        const isOci = [OCI_MANIFEST, OCI_INDEX].includes(entry.descriptor.mediaType);
        const isFound = entry.refName !== "" && isOci;
        return isFound ? faultsOfTree(entry) : [{ kind: "no-name" as const }];
      });
    return [...ofEntries, ...ofUnpacking];
  }

  /** podman and skopeo unpack a layout where docker does so behind a root of its own. */
  #faultsOfUnpackingLayout(): LoaderFault[] {
    const links = [...this.#documents.entries()].filter(
      ({ type, name, linkName }) =>
        type === "2" && path.posix.join(path.posix.dirname(name), linkName).startsWith(".."),
    );
    return [
      ...links.map(({ name: entry }) => ({ kind: "odd-link" as const, entry })),
      ...faultsOfUnpacking(this.#documents.entries()),
    ];
  }

  #faultsOfNames(): LoaderFault[] {
    return this.#isRooted ? [{ kind: "rooted-names" }] : [];
  }

  #faultsOfImage(image: Omit<HeldImage, "name">): LoaderFault[] {
    if (!image.isImage) return [{ kind: "no-image", entry: image.parts[0]?.entry ?? "" }];
    return image.parts.slice(1).flatMap((part) => this.#faultsOfLayer(part));
  }

  /** Their unpackers meet what is no tar, and what follows a gzip member that is none. */
  #faultsOfLayer(part: HeldPart): LoaderFault[] {
    const { entry } = part;
    if (this.#documents.isEncrypted(entry)) return [{ kind: "encrypted", entry }];
    const unpacked = this.#unpacked(part);
    const isUnknown = unpacked?.outcome === "not-unpacked" && unpacked.packing !== "zstd";
    if (isUnknown) return [{ kind: "packing", entry }];
    if (!unpacked || unpacked.outcome === "not-unpacked") return [];
    const hasRest = unpacked.packing === "gzip" && unpacked.hasRest;
    if (hasRest) return [{ kind: "trailing-bytes", entry }];
    const isPartial = unpacked.packing === "zstd" && unpacked.hasRest;
    if (!unpacked.isTar && !isPartial) return [{ kind: "no-tar", entry }];
    return unpacked.odd ? [{ entry, ...unpacked.odd }] : [];
  }

  /** It believes OCI's type for a plain layer (containerd/containerd#9981). */
  #faultsOfLabel(part: HeldPart): LoaderFault[] {
    const { entry, mediaType } = part;
    const packing = this.#unpacked(part)?.packing;
    const isPlainType = /^application\/vnd\.oci\.image\.layer\..*\.tar$/.test(mediaType);
    return isPlainType && packing ? [{ kind: "label", entry }] : [];
  }
}

/** What a program that copies layers as they are does not meet. */
const OF_UNPACKING: readonly LoaderFault["kind"][] = ["no-tar", "path-twice", "odd-path"];

const namesOfParts = ({ parts }: Pick<HeldImage, "parts">): string[] =>
  parts.map(({ entry }) => entry);

/** An index in an index, or one of which platforms are not here, which other machines want. */
function faultsOfTree({ descriptor, platforms }: HeldEntry): LoaderFault[] {
  if (!platforms) return [];
  const entry = blobPath(descriptor.digest);
  if (platforms.depth > 1) return [{ kind: "nested-index", entry }];
  return platforms.here < platforms.named ? [{ kind: "partial-index", entry }] : [];
}

/**
 * Of a tar that is unpacked before it is read: a hard link needs a file before it, and some types
 * are no files.
 */
function faultsOfUnpacking(entries: Iterable<TarEntry>): LoaderFault[] {
  const faults: LoaderFault[] = [];
  const files = new Set<string>();
  for (const header of entries) {
    const { name: entry, type, linkName } = header;
    const isRight = UNPACKED_TYPES.includes(type) && isUnpackable(header);
    if (!isRight) faults.push({ kind: "odd-entry", entry });
    const isDangling = type === "1" && !files.has(resolveName(linkName));
    if (isDangling) faults.push({ kind: "odd-link", entry });
    if (type !== "5") files.add(entry);
  }
  return faults;
}

/**
 * The second of two images under one name takes the place of the first, whose content containerd
 * then removes.
 */
function faultsOfSameName(entries: readonly HeldEntry[]): LoaderFault[] {
  const digests = new Map<string, string>();
  for (const { name, descriptor } of entries) {
    const before = digests.get(name) ?? descriptor.digest;
    if (before !== descriptor.digest) return [{ kind: "same-name", entry: "index.json" }];
    digests.set(name, before);
  }
  return [];
}

/** As docker reads RepoTags: a name with a tag. */
const isTaggedName = (text: string): boolean =>
  /^[^@]*:[^:/@]+(@|$)/.test(text) && isReference(text);

// ------ Signatures in a tar ------

/** A manifest that index.json leads to. */
type HeldManifest = Readonly<{ digest: string; manifest: ImageManifest | IndexManifest }>;

/** All manifests that are there, each once. */
function manifestsIn(documents: TarDocuments, { entries }: HeldImages): HeldManifest[] {
  const held = new Map<string, HeldManifest>();
  const collect = (descriptor: Descriptor, depth: number): void => {
    const { digest } = descriptor;
    const manifest = held.has(digest) ? undefined : documents.manifest(descriptor);
    if (!manifest || depth > LIMITS.indexDepth) return;
    held.set(digest, { digest, manifest });
    if (manifest.kind === "index")
      for (const child of manifest.manifests) collect(child, depth + 1);
  };

  for (const { descriptor } of entries) collect(descriptor, 0);
  return [...held.values()];
}

/**
 * What signatures vouch for: the digests that they name, and what the indexes among these lead to.
 */
function vouchedFor(
  manifests: readonly HeldManifest[],
  testimonies: readonly Testimony[],
): ReadonlySet<string> {
  const vouched = new Set<string>();
  const add = (digest: string): void => {
    if (vouched.has(digest)) return;
    vouched.add(digest);
    const manifest = manifests.find((held) => held.digest === digest)?.manifest;
    if (manifest?.kind === "index") for (const child of manifest.manifests) add(child.digest);
  };

  for (const testimony of testimonies)
    if (typeof testimony === "object") testimony.subjects.forEach(add);
  return vouched;
}

/**
 * SIGNATURE where an image is not vouched for, by the signatures that the tar itself holds. Its own
 * word for what is proof and what is an image counts only for what no loader takes by a name, or as
 * the only one; and manifest.json, by which docker loads, may name no other config than that of an
 * image which is vouched for.
 */
function requireSignatures(
  where: string,
  documents: TarDocuments,
  held: HeldImages,
  signers: readonly SignerKey[],
): void {
  const manifests = manifestsIn(documents, held);
  const images = manifests.flatMap(({ digest, manifest }) =>
    manifest.kind === "image" ? [{ digest, manifest }] : [],
  );
  const layers = images.flatMap(({ manifest }) => manifest.layers.filter(isSignature));
  checkSignatureCount(layers, where);

  const testimonies = layers.map((layer): Testimony => {
    const bytes = documents.bytes(layer.digest);
    return bytes ? readSignature(layer, bytes, signers) : "unreadable";
  });
  const vouched = vouchedFor(manifests, testimonies);
  const verdicts = (digest: string) => testimonies.map((each) => judge(each, [digest]));
  for (const { descriptor, name, isCompanion } of held.entries) {
    const { digest } = descriptor;
    const shown = `${where}: ${name.replace(/@.*/, "")}@${digest}`;
    const isLoaded = !isCompanion || held.entries.length === 1;
    if (isLoaded && !vouched.has(digest)) refuseUnsigned(shown, verdicts(digest), signers);
  }

  const signedConfigs = images
    .filter(({ digest }) => vouched.has(digest))
    .map(({ manifest }) => manifest.config.digest);
  for (const { name, parts } of held.listed) {
    // behind a link, where it is one
    const config = documents.file(parts[0]?.entry ?? "")?.entry.name ?? "";
    const isSigned = signedConfigs.includes(digestInName(config) ?? "");
    if (!isSigned) refuseUnsigned(`${where}: ${name} of manifest.json`, verdicts(""), signers);
  }
}

// ------ Report ------

/** Reads a source once, and lets it go. */
async function lookThrough(
  source: TarSource,
  withContent: boolean,
  options: LookOptions,
): Promise<TarContents> {
  const look = () =>
    stoppable(options.signal, async (signal, callbacks) => {
      const opened = await openTarSource(source, signal);
      const onProgress = callbacks.guard(options.onProgress);
      try {
        return await new Look(opened, { ...options, signal, onProgress }).run(withContent);
      } finally {
        await opened.close();
      }
    });
  return onDisk(`cannot read ${nameOfSource(source)}`, look());
}

const LOOK_OPTION_KINDS = {
  signal: "an AbortSignal",
  onProgress: "a function",
} as const satisfies Record<keyof LookOptions, OptionKind>;

const VERIFY_OPTION_KINDS = {
  ...LOOK_OPTION_KINDS,
  signedBy: "a list of strings",
  since: "a string",
} as const satisfies Record<keyof VerifyOptions, OptionKind>;

function checkLook(
  source: TarSource,
  options: LookOptions,
  kinds: Readonly<Record<string, OptionKind>> = LOOK_OPTION_KINDS,
): void {
  checkKinds(options, kinds);
  const isPath = typeof source === "string" && !hasNul(source);
  const isSource = isPath || Symbol.asyncIterator in Object(source);
  if (!isSource) fail("BAD_OPTION", "a tar is the path of a file or folder, or a stream of bytes");
}

/**
 * What a tar holds, without a look at its bytes. Throws BAD_TAR where that cannot be read from it.
 */
async function listTar(source: TarSource, options: LookOptions = {}): Promise<TarImage[]> {
  checkLook(source, options);
  const contents = await lookThrough(source, false, options);
  refuseProblems(
    contents.where,
    contents.problems.filter(({ kind }) => kind !== "cut-off"),
  );
  const documents = new TarDocuments(contents);
  const finder = new ImageFinder(documents);
  const held = finder.run();
  refuseProblems(contents.where, [...documents.problems, ...finder.problems]);
  return imagesOf(held).map((image) => describeImage(image, documents));
}

/**
 * Hashes every blob, looks for every reference, unpacks every layer. Throws BAD_TAR with all that
 * is wrong: in words, and as values in the error's `report`. SIGNATURE where all is right, but not
 * signed.
 */
async function verifyTar(source: TarSource, options: VerifyOptions = {}): Promise<TarReport> {
  checkLook(source, options, VERIFY_OPTION_KINDS);
  const signers = await readSigners(options.signedBy);
  const report = await inspectTar(source, options, signers);
  refuseProblems(nameOfSource(source), report.problems, report);
  return report;
}

/** A whole report, whatever is wrong. */
async function inspectTar(
  source: TarSource,
  options: VerifyOptions,
  signers: readonly SignerKey[],
): Promise<TarReport> {
  const base = options.since === undefined ? undefined : await readBase(options.since, options);
  const contents = await lookThrough(source, true, options);
  const files = [...contents.files.values()];
  const problems = [...files.flatMap(problemsOfFile), ...contents.problems];
  const blobCount = files.filter(({ entry }) => digestInName(entry.name)).length;
  const isReadable = contents.problems.every(({ kind }) => kind === "cut-off");
  if (!isReadable)
    return {
      images: [],
      blobs: blobCount,
      unpackedLayers: 0,
      baseLayers: 0,
      notUnpacked: [],
      platforms: { here: 0, named: 0 },
      absentManifests: 0,
      loaders: [],
      problems,
    };

  const documents = new TarDocuments(contents, base);
  const finder = new ImageFinder(documents);
  const held = finder.run();
  const images = imagesOf(held);
  const named = [...held.indexed, ...held.listed, ...held.companions];
  const check = new PartCheck(documents);
  for (const image of named) check.checkImage(image);
  for (const blob of held.blobs) check.checkPart(blob);

  problems.push(...documents.problems, ...finder.problems, ...check.problems);
  const isWhole = problems.length === 0;
  if (isWhole && signers.length > 0)
    requireSignatures(nameOfSource(source), documents, held, signers);
  return {
    images: images.map((image) => describeImage(image, documents)),
    blobs: blobCount,
    unpackedLayers: check.unpackedLayers,
    baseLayers: check.layersOfBase.size,
    notUnpacked: [...check.notUnpacked].map(([reason, layers]) => ({ reason, layers })),
    platforms: {
      here: sumOf(held.indexes, ({ here }) => here),
      named: sumOf(held.indexes, ({ named }) => named),
    },
    absentManifests: sumOf(held.indexes, ({ absentManifests }) => absentManifests),
    loaders: new LoaderJudge(held, documents).run(),
    problems: uniqueProblems(problems),
  };
}

/** The base of a delta; what is wrong with its files is as bad as if they stood in the delta. */
async function readBase(file: string, { signal }: LookOptions): Promise<BaseTar> {
  const contents = await lookThrough(file, true, { signal });
  const files = [...contents.files.values()];
  refuseProblems(file, [...files.flatMap(problemsOfFile), ...contents.problems]);
  return new BaseTar(contents);
}

function problemsOfFile({ entry, isIntact, unpacked }: SeenFile): TarProblem[] {
  const isEndless = unpacked?.outcome === "endless";
  if (isEndless) return [{ kind: "unpacks-without-end", entry: entry.name }];
  return isIntact ? [] : [{ kind: "damaged", entry: entry.name }];
}

/** By index.json, or by manifest.json where that names none. */
const imagesOf = ({ indexed, listed }: HeldImages): readonly HeldImage[] =>
  indexed.length > 0 ? indexed : listed;

function describeImage(image: HeldImage, documents: TarDocuments): TarImage {
  const layers = image.parts.slice(1).map(({ entry, size }) => ({
    digest: digestInName(entry) ?? printable(entry),
    size,
    present: documents.layer(entry) !== undefined,
  }));
  const { name, digest, platform, isImage } = image;
  const { here = 0, named = 0 } = image.platforms ?? {};
  const platforms = here < named ? { here, named } : undefined;
  const sizeBytes = sumOf(layers, ({ size }) => size);
  return { name, digest, platform, isImage, sizeBytes, layers, ...dropEmpty({ platforms }) };
}

function uniqueProblems(problems: readonly TarProblem[]): TarProblem[] {
  return [...new Map(problems.map((problem) => [JSON.stringify(problem), problem])).values()];
}

function refuseProblems(where: string, problems: readonly TarProblem[], report?: TarReport): void {
  const unique = uniqueProblems(problems);
  const lines = unique
    .slice(0, LIMITS.problemLines)
    .map((problem) => `${where}: ${printable(problemWords(problem), 1000)}`);
  if (unique.length > lines.length)
    lines.push(`${where}: and ${unique.length - lines.length} more things are wrong`);
  if (lines.length > 0 && where.endsWith(".partial"))
    lines.push(
      `${where}: it is what a pull keeps until it is whole: the same command goes on with it`,
    );
  if (lines.length > 0) fail("BAD_TAR", lines.join("\n"), { report });
}

// ------ Reading it for other purposes ------

/** A file in a tar. */
interface TarFile {
  name: string;
  sizeBytes: number;
  /** The one that its name has: `sha256:…`. It is believed only when the content has it. */
  digest?: string;
  /** The bytes. Of a stream, only until the next file is asked for. */
  content(): AsyncIterable<Uint8Array>;
}

/** A tar, or an OCI layout folder, as its files. */
class TarReader {
  readonly #opened: OpenTarSource;
  #isBegun = false;

  /** @internal */
  constructor(opened: OpenTarSource) {
    this.#opened = opened;
  }

  /** All files in order. A stream, or a compressed tar, can be gone through once. */
  async *files(): AsyncGenerator<TarFile> {
    const { isSeekable, where } = this.#opened;
    if (this.#isBegun && !isSeekable)
      fail("UNSUPPORTED", `${where}: a stream, or a compressed tar, can be gone through once`);
    this.#isBegun = true;
    for await (const { entry, content } of this.#opened.members()) {
      if (!"0S".includes(entry.type)) continue;
      const digest = digestInName(entry.name);
      yield {
        name: entry.name,
        sizeBytes: lengthOfEntry(entry),
        ...(digest !== undefined && { digest }),
        content,
      };
    }
  }

  /**
   * The bytes of a blob, which end in DIGEST_MISMATCH where they are wrong. Looks through `files()`
   * for it.
   */
  async *blob(digest: string): AsyncGenerator<Uint8Array> {
    for await (const file of this.files()) {
      if (file.digest !== digest) continue;
      const hash = newHash(digest);
      for await (const piece of file.content()) {
        hash.update(piece);
        yield piece;
      }
      if (hash.digest("hex") !== hexOf(digest))
        fail("DIGEST_MISMATCH", `${this.#opened.where}: ${file.name} has another digest`);
      return;
    }
    fail("NOT_FOUND", `${this.#opened.where} does not hold ${printable(digest)}`);
  }

  /** Lets go of the file or the stream. */
  close(): Promise<void> {
    return this.#opened.close();
  }
}

/** Opens a tar or an OCI layout folder, to read what is in it. To be closed. */
async function openTar(source: TarSource, options: LookOptions = {}): Promise<TarReader> {
  checkLook(source, options);
  const where = nameOfSource(source);
  return new TarReader(await onDisk(`cannot read ${where}`, openTarSource(source, options.signal)));
}

// ====== 16. Command line ======
// One table of options, from which parsing, help, --parsed and the README's come. stdout is data,
// stderr is talk.

// ------ The table of options ------

/** An option. Without `value` it is a switch; a value named `a|b` is one of these words. */
type OptionSpec = Readonly<{
  short?: string;
  value?: string;
  help: string;
  alias?: string;
  isRepeatable?: true;
  /** `--parsed` shows *** in place of its value. */
  isSecret?: true;
  /**
   * The library's name of it, and how what was typed becomes its value there, where that is not the
   * text itself.
   */
  option?: keyof PullOptions;
  convert?: (typed: never) => unknown;
  /** What it goes with, where that is not what the options around it go with. */
  tasks?: readonly Task[];
}>;

/** What a command line is for. */
type Task = "pull" | "manifest" | "list-tar" | "verify";

const PULL_OPTIONS = {
  os: {
    short: "o",
    value: "OS",
    help: "operating system wanted; default: this machine's",
    option: "osType",
    tasks: ["pull", "manifest"],
  },
  arch: {
    short: "a",
    value: "ARCH",
    help: "processor wanted (amd64, arm64, arm ...)",
    option: "archType",
    tasks: ["pull", "manifest"],
  },
  variant: {
    value: "V",
    help: "processor variant wanted (v7, v8 ...)",
    option: "variant",
    tasks: ["pull", "manifest"],
  },
  platform: {
    value: "OS/ARCH[/V]",
    help: "the three in one word; several with commas; or all",
    option: "platforms",
    convert: (typed: string) => (typed === "all" ? typed : typed.split(",")),
    tasks: ["pull", "manifest"],
  },
  from: { value: "FILE", help: "read more IMAGEs: lines, YAML, JSON; - is stdin" },
  name: { value: "NAME", help: "the name that the image gets in the tar", option: "name" },
  rename: {
    value: "FROM=TO",
    help: "in the tar, names in FROM are in TO (repeatable)",
    isRepeatable: true,
    option: "renames",
    convert: (typed: readonly string[]) => parsePairs("rename", typed),
  },
  reuse: {
    value: "TAR",
    help: "take blobs from a tar that exists (repeatable)",
    isRepeatable: true,
    option: "reuse",
  },
  since: {
    value: "TAR",
    help: "leave out layers TAR holds; of --verify: its base",
    option: "since",
    tasks: ["pull", "verify"],
  },
  referrers: { help: "bring signatures, attestations and SBOMs along", option: "referrers" },
  "signed-by": {
    value: "KEY",
    help: "only what this PEM key signed (repeatable)",
    isRepeatable: true,
    option: "signedBy",
    tasks: ["pull", "manifest", "verify"],
  },
  "dry-run": { help: "say what would be pulled, write nothing", option: "dryRun" },
} as const satisfies Record<string, OptionSpec>;

const REGISTRY_OPTIONS = {
  ns: {
    short: "n",
    value: "HOST",
    help: "the registry that a mirror stands for (?ns=)",
    option: "namespace",
  },
  mirror: {
    value: "HOST=PLACE",
    help: "ask PLACE first for images of HOST (repeatable)",
    isRepeatable: true,
    option: "mirrors",
    convert: (typed: readonly string[]) => parseLists("mirror", typed),
  },
  scheme: { short: "s", value: "https|http", help: "default https", option: "scheme" },
  user: {
    short: "u",
    value: "NAME",
    help: "user name for basic authentication",
    option: "username",
  },
  password: {
    short: "p",
    value: "WORD",
    help: "its password",
    isSecret: true,
    option: "password",
  },
  "password-stdin": { help: "read the password from stdin" },
  token: {
    short: "t",
    value: "TOKEN",
    help: "sent as Basic TOKEN",
    isSecret: true,
    option: "token",
  },
  cert: { short: "c", value: "FILE", help: "client certificate (PEM)", option: "tlsCert" },
  key: { short: "k", value: "FILE", help: "its key (PEM)", option: "tlsKey" },
  cacert: {
    short: "x",
    value: "FILE",
    help: "trust this CA as well (PEM); alias --ca",
    alias: "ca",
    option: "caCert",
  },
  insecure: { short: "i", help: "do not verify the server's certificate", option: "insecure" },
  concurrency: {
    short: "j",
    value: "N",
    help: "connections used at once, 1 to 64; default 16",
    option: "concurrency",
    convert: (typed: string) => parseNumber("concurrency", typed),
  },
  retries: {
    value: "N",
    help: "attempts after the first; default 5",
    option: "retries",
    convert: (typed: string) => parseNumber("retries", typed),
  },
  timeout: {
    value: "SECONDS",
    help: "how long a connection may be silent; default 30",
    option: "timeoutMs",
    convert: (typed: string) => Math.ceil(parseNumber("timeout", typed) * 1000),
  },
} as const satisfies Record<string, OptionSpec>;

const LOOK_OPTIONS = {
  manifest: { short: "m", value: "list|image", help: "print the manifest", tasks: ["manifest"] },
  "list-tar": {
    short: "l",
    value: "TAR",
    help: "say what a tar holds, offline",
    tasks: ["list-tar"],
  },
  verify: { value: "TAR", help: "hash a tar again, offline", tasks: ["verify"] },
  parsed: { help: "print the parsed command line as JSON" },
  quiet: { short: "q", help: "no progress" },
  version: { short: "v", help: "print the version" },
  help: { short: "h", help: "print this help" },
} as const satisfies Record<string, OptionSpec>;

const OPTION_TABLE = { ...PULL_OPTIONS, ...REGISTRY_OPTIONS, ...LOOK_OPTIONS };
type OptionName = keyof typeof OPTION_TABLE;
/** The names of the options whose line of the table has a property. */
type NamesWith<Property extends keyof OptionSpec> = {
  [Name in OptionName]: (typeof OPTION_TABLE)[Name] extends Record<Property, unknown>
    ? Name
    : never;
}[OptionName];

type NamedOption = OptionSpec & Readonly<{ name: OptionName; tasks: readonly Task[] }>;
const OPTION_GROUPS: readonly Readonly<{
  title: string;
  options: Record<string, OptionSpec>;
  tasks: readonly Task[];
}>[] = [
  { title: "What to pull", options: PULL_OPTIONS, tasks: ["pull"] },
  { title: "Registry", options: REGISTRY_OPTIONS, tasks: ["pull", "manifest"] },
  {
    title: "Look, do not pull",
    options: LOOK_OPTIONS,
    tasks: ["pull", "manifest", "list-tar", "verify"],
  },
];
const OPTIONS = OPTION_GROUPS.flatMap(({ options, tasks }) =>
  Object.entries(options).map(([name, spec]) => ({ name, tasks, ...spec }) as NamedOption),
);

// ------ Help ------

const USAGE = `imgpull [options] IMAGE [IMAGE...] [DEST]    pull images into one verified tar
DEST: a file; - for stdout; a directory or NAME/ for an OCI layout
`;
const EXAMPLES = `Examples:  imgpull alpine:3.22 --platform linux/arm64 - | ssh host podman load
           imgpull --from images.txt bundle.tar > images.lock
`;

function formatHelp(): string {
  const formatLine = ([name, { short, value = "", help }]: [string, OptionSpec]) => {
    const form = `${short ? `-${short},` : "   "} --${name} ${value}`;
    return `  ${form.padEnd(28)}${help}\n`;
  };
  const formatGroup = ({ title, options }: (typeof OPTION_GROUPS)[number]) =>
    `${title}:\n${Object.entries(options).map(formatLine).join("")}`;

  return USAGE + OPTION_GROUPS.map(formatGroup).join("") + EXAMPLES;
}

// ------ Parsing ------

const usage = (reason: string): never => fail("BAD_OPTION", `${reason} (imgpull --help)`);

/** What was typed: each option by its name in the table. */
type CommandLine = Readonly<{
  values: Partial<Record<NamesWith<"value">, string>>;
  lists: Partial<Record<NamesWith<"isRepeatable">, string[]>>;
  switches: Set<OptionName>;
  positionals: readonly string[];
}>;

const DEST_IS_LAST = "DEST is the last word: imgpull IMAGE DEST";

/** What other programs call it. */
const HABITS: Readonly<Record<string, string>> = {
  output: DEST_IS_LAST,
  file: DEST_IS_LAST,
  http: "say --scheme http",
  "plain-http": "say --scheme http",
  "tls-verify": "say --insecure to go without",
  "all-platforms": "say --platform all",
  authfile: "set REGISTRY_AUTH_FILE=FILE in the environment",
};

function refuseUnknown(rawName: string, name: string): never {
  if (Object.hasOwn(HABITS, name)) usage(`unknown option ${rawName}: ${HABITS[name]}`);
  const nearest = nearestName(name, Object.keys(OPTION_TABLE));
  const suggestion = nearest === undefined ? "" : `: did you mean --${nearest}?`;
  return usage(`unknown option ${printable(rawName, 60)}${suggestion}`);
}

type OptionToken = Readonly<{
  rawName: string;
  value: string | undefined;
  inlineValue: boolean | undefined;
}>;

/**
 * The value of an option as it was typed, after --name, --name=, -n, or right behind -n with or
 * without =.
 */
function typedValue(spec: NamedOption, { rawName, value: text, inlineValue }: OptionToken): string {
  const isShort = !rawName.startsWith("--");
  const value = isShort && inlineValue ? text?.replace(/^=/, "") : text;
  const isNextOption = !inlineValue && value?.startsWith("-") && value !== "-";
  if (!value || isNextOption) return usage(`${rawName} needs a value (${spec.value})`);

  const choices = spec.value?.split("|") ?? [];
  if (choices.length > 1 && !choices.includes(value))
    usage(`--${spec.name} is ${choices.join(" or ")}, not "${printable(value)}"`);
  return value;
}

function parseCommandLine(argv: readonly string[]): CommandLine {
  const spellings = OPTIONS.flatMap((option) =>
    [option.name, option.alias ?? []].flat().map((spelling) => [spelling, option] as const),
  );
  const specs = new Map<string, NamedOption>(spellings);
  const options = Object.fromEntries(
    spellings.map(([spelling, { short, value }]) => [
      spelling,
      { type: value ? ("string" as const) : ("boolean" as const), ...dropEmpty({ short }) },
    ]),
  );
  const { tokens, positionals } = parseArgs({
    args: [...argv],
    options,
    strict: false,
    allowPositionals: true,
    tokens: true,
  });

  const line: CommandLine = { values: {}, lists: {}, switches: new Set(), positionals };
  for (const token of tokens) {
    if (token.kind !== "option") continue;
    const spec = specs.get(token.name) ?? refuseUnknown(token.rawName, token.name);
    addOption(line, spec, token);
  }
  return line;
}

function addOption(line: CommandLine, spec: NamedOption, token: OptionToken): void {
  const values: Record<string, string> = line.values;
  const lists: Record<string, string[]> = line.lists;
  const { name } = spec;
  if (name in values || line.switches.has(name)) usage(`--${name} is given twice`);

  if (!spec.value) {
    if (token.value !== undefined) usage(`${token.rawName} takes no value`);
    line.switches.add(name);
  } else if (spec.isRepeatable) {
    lists[name] = [...(lists[name] ?? []), typedValue(spec, token)];
  } else {
    values[name] = typedValue(spec, token);
  }
}

// ------ From the command line to the library's words ------

/** A number as people write it: no exponent, no hexadecimal, no sign. */
function parseNumber(option: string, typed: string): number {
  if (!/^\d+(\.\d+)?$/.test(typed)) usage(`--${option} is a number, not "${printable(typed)}"`);
  return Number(typed);
}

/** `FROM=TO`, several times. */
function parsePairs(option: string, typed: readonly string[]): Record<string, string> {
  const pairs = new Map<string, string>();
  for (const text of typed) {
    const [from = "", to = "", ...more] = text.split("=");
    if (from === "" || to === "" || more.length > 0)
      usage(`--${option} is FROM=TO, not "${printable(text)}"`);
    if (pairs.has(from)) usage(`--${option} ${printable(from)} is given twice`);
    pairs.set(from, to);
  }
  return Object.fromEntries(pairs);
}

/** `HOST=PLACE`, several of each HOST. */
function parseLists(option: string, typed: readonly string[]): Record<string, string[]> {
  const lists = new Map<string, string[]>();
  for (const text of typed) {
    const [, host = "", place = ""] = /^([^=]+)=(.+)$/.exec(text) ?? [];
    if (host === "")
      usage(`--${option} is HOST=PLACE, not "${printable(text.replace(/^.*@/, "***@"))}"`);
    lists.set(host, [...(lists.get(host) ?? []), place]);
  }
  return Object.fromEntries(lists);
}

/** What is pulled how, in the library's words. */
function optionsOf({ values, lists, switches }: CommandLine): PullOptions {
  const options: Record<string, unknown> = {};
  for (const { name, option, convert = (typed: unknown) => typed } of OPTIONS) {
    const typed = { ...values, ...lists }[name as NamesWith<"value">] ?? switches.has(name);
    if (option !== undefined && typed !== false) options[option] = convert(typed as never);
  }
  return options;
}

/** Sentences of the library name options as `option`: here they are what is typed. */
const inTypedWords = (sentence: string): string =>
  sentence.replace(/`(\w+)`/g, (quoted, option) => {
    const spec = OPTIONS.find((each) => each.option === option || each.name === option);
    return spec ? `--${spec.name}` : quoted;
  });

function taskOf({ manifest, verify, "list-tar": listed }: CommandLine["values"]): Task {
  if (verify !== undefined) return "verify";
  if (listed !== undefined) return "list-tar";
  return manifest === undefined ? "pull" : "manifest";
}

/** An option without a meaning for what is asked for is refused: who gave it counts on it. */
function checkTask(task: Task, { values, lists, switches }: CommandLine): void {
  const typed = new Set([...Object.keys(values), ...Object.keys(lists), ...switches]);
  const stranger = OPTIONS.find(({ name, tasks }) => typed.has(name) && !tasks.includes(task));
  if (stranger) usage(`--${stranger.name} does not go with --${task}`);
}

/**
 * What the library cannot know of: words of other programs, who asks for stdin, what is only looked
 * at.
 */
function checkCombinations(line: CommandLine): void {
  const { values, switches, positionals } = line;
  const { from, os: system } = values;
  const task = taskOf(values);
  if (positionals[0] === "pull")
    usage('imgpull only pulls, and has no "pull" in front: imgpull IMAGE DEST');
  if (system !== undefined && /\W/.test(system))
    usage(`-o is --os, and ${printable(system)} is no operating system: ${DEST_IS_LAST}`);
  checkTask(task, line);
  const isPasswordOnStdin = switches.has("password-stdin");
  if (values.password !== undefined && isPasswordOnStdin)
    usage("--password and --password-stdin exclude each other");
  if (isPasswordOnStdin && values.user === undefined) usage("--password-stdin needs --user");
  if (values.user !== undefined && values.password === undefined && !isPasswordOnStdin)
    usage("--user needs --password or --password-stdin");
  if (isPasswordOnStdin && from === "-")
    usage("stdin is asked for twice: --password-stdin and --from -");

  const isLooking = task === "verify" || task === "list-tar";
  if (isLooking && positionals.length > 0) usage(`--${task} takes one tar, and no IMAGE or DEST`);
  if (isLooking || positionals.length > 0) return;
  if (from === undefined) usage("IMAGE is missing");
  if (!switches.has("dry-run")) usage(`DEST is missing: ${DEST_IS_LAST}`);
}

/** Which of the positionals are IMAGEs, and which is DEST: as with cp, the last one. */
function splitPositionals({ values, positionals }: CommandLine) {
  const { manifest, from } = values;
  if (manifest !== undefined) return { images: positionals.slice(0, 1) }; // a DEST is ignored
  const isDestinationThere = positionals.length > (from === undefined ? 1 : 0);
  if (!isDestinationThere) return { images: positionals };
  return { images: positionals.slice(0, -1), destination: positionals.at(-1) };
}

/** A DEST in an IMAGE's place. Docker's own images, those of one word, have no such names. */
function checkImages(images: readonly string[], destination: string | undefined): void {
  const tar = images.find((image) => /^[^/:@]+\.tar$/i.test(image));
  if (tar === undefined) return;

  const name = printable(tar);
  if (destination !== undefined) usage(`${name} is no IMAGE: ${DEST_IS_LAST}`);
  usage(`IMAGE is missing: ${name} is a DEST; --list-tar ${name} says what it holds`);
}

/** All that the command line asks for, checked as far as that goes without reading anything. */
function planCommand(line: CommandLine) {
  checkCombinations(line);
  const { values, switches } = line;
  const { images, destination } = splitPositionals(line);
  const options = optionsOf(line);
  const isPasswordOnStdin = switches.has("password-stdin");
  if (destination === "") usage("DEST is empty");
  checkImages(images, destination);
  if (values.name !== undefined && (images.length !== 1 || values.from !== undefined))
    usage("--name goes with one IMAGE");

  const passwordToCome = isPasswordOnStdin ? { password: "" } : {};
  new Puller({ ...options, ...passwordToCome, url: "any/image" }); // it checks its options
  return {
    images,
    destination,
    from: values.from,
    manifest: values.manifest as "list" | "image" | undefined,
    isPasswordOnStdin,
    isQuiet: switches.has("quiet"),
    options,
  };
}
type Command = ReturnType<typeof planCommand>;

// ------ DEST ------

/** What people call a compressed tar. */
const PACKED_TAR = /\.(tgz|tzst|txz|tbz2?|tar\.(gz|zst|zstd|xz|bz2|lz4|lzma))$/i;

/**
 * `imgpull alpine:3 quay.io/org/app:1` means two images, not a file of that name: unless there is
 * such a folder.
 */
async function checkDestinationName(destination: string): Promise<void> {
  const [packed] = PACKED_TAR.exec(destination) ?? [];
  if (packed !== undefined)
    usage(`DEST is a plain tar, not a ${packed}: layers are compressed already; call it .tar`);

  const isDrive = isWindows && /^[A-Za-z]:/.test(destination);
  const isFileName = destination.includes("\\") || /\.(tar|oci|img|tgz|zip|gz)$/i.test(destination);
  if (isDrive || isFileName || !isReference(destination)) return;

  const hasFolder = destination.includes("/");
  const isHosted = hasFolder && /^[^/]*[.:]|^localhost\//.test(destination);
  const isTagged = /[:@]/.test(destination);
  if (!isTagged && !isHosted) return;

  const folder = path.dirname(destination);
  const isFolderThere = hasFolder && (await fs.stat(folder).catch(ignore)) !== undefined;
  if (isFolderThere) return;
  usage(`DEST is missing: "${destination}" reads as an IMAGE; say ./${destination} to mean a file`);
}

/** @internal What a command has of its process: all that it reads and writes, but for files. Tests give their own. */
type CommandIO = Readonly<{
  stdin: NodeJS.ReadableStream & { isTTY?: boolean };
  stdout: NodeJS.WritableStream & { isTTY?: boolean };
  stderr: NodeJS.WritableStream & { isTTY?: boolean; columns?: number; rows?: number };
  env: Environment;
}>;

// ------ Progress on a terminal, and in a log ------

const formatBlobSizes = ({ doneBytes, sizeBytes }: BlobProgress): string =>
  [doneBytes, sizeBytes].map((bytes) => formatBytes(bytes).padStart(7)).join(" of ");

/**
 * `996a91d326c9  4.2 MB of  12 MB [######          ]`, without the bar where it is too narrow for
 * one.
 */
function formatBar(blob: BlobProgress, width: number): string {
  const label = `${hexOf(blob.digest).slice(0, 12)} ${formatBlobSizes(blob)} `;
  const room = Math.min(30, width - label.length - 2);
  if (room < 5) return label.slice(0, width);
  const filled = Math.round((room * blob.doneBytes) / Math.max(1, blob.sizeBytes));
  return `${label}[${"#".repeat(filled)}${" ".repeat(room - filled)}]`;
}

/** Bytes a second, over the last fifty times that it was asked: five seconds on a terminal. */
class Rate {
  readonly #samples: { atMs: number; bytes: number }[] = [];

  add(bytes: number): void {
    this.#samples.push({ atMs: performance.now(), bytes });
    if (this.#samples.length > 50) this.#samples.shift();
  }

  get bytesPerSecond(): number {
    const first = this.#samples[0];
    const last = this.#samples.at(-1);
    if (!first || !last) return 0;
    return ((last.bytes - first.bytes) * 1000) / Math.max(1, last.atMs - first.atMs);
  }
}

function formatTotal({ doneBytes, totalBytes }: Progress, bytesPerSecond: number): string {
  const secondsLeft = Math.ceil((totalBytes - doneBytes) / bytesPerSecond);
  const left = bytesPerSecond > 0 ? `, ${secondsLeft} s left` : "";
  return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${formatBytes(bytesPerSecond)}/s${left}`;
}

/**
 * Progress and talk on stderr: redrawn in place on a terminal; elsewhere a line for each blob, and
 * every ten seconds.
 */
class Display {
  readonly #stderr: CommandIO["stderr"];
  readonly #isQuiet: boolean;
  readonly #isLive: boolean;
  readonly #isDimmed: boolean;
  readonly #rate = new Rate();
  readonly #timer: NodeJS.Timeout | undefined;
  #latest: Progress | undefined;
  #drawnLines = 0;

  constructor({ stderr, env }: CommandIO, isQuiet: boolean) {
    this.#stderr = stderr;
    this.#isQuiet = isQuiet;
    this.#isLive = stderr.isTTY === true && !isQuiet && env.TERM !== "dumb";
    this.#isDimmed = !env.NO_COLOR;
    const redraw = () => this.#draw();
    if (!isQuiet) this.#timer = setInterval(redraw, this.#isLive ? 100 : 10_000).unref();
  }

  readonly show = (progress: Progress): void => {
    if (progress.phase === "resolve") return;
    if (!this.#latest) this.#rate.add(progress.fetchedBytes);
    this.#latest = progress;
    const { finished } = progress;
    if (finished && !this.#isQuiet && !this.#isLive)
      this.say(`${finished.digest.slice(0, 19)} ${formatBytes(finished.sizeBytes)} done`);
  };

  /** A line of talk; the progress comes back below it. */
  readonly say = (text: string): void => {
    this.#clear();
    this.#stderr.write(`imgpull: ${inTypedWords(text)}\n`);
  };

  stop(): void {
    clearInterval(this.#timer);
    this.#clear();
    this.#latest = undefined;
  }

  #draw(): void {
    const progress = this.#latest;
    if (!progress) return;
    this.#rate.add(progress.fetchedBytes);
    const total = formatTotal(progress, this.#rate.bytesPerSecond);
    if (!this.#isLive) {
      this.say(total);
      return;
    }

    const { columns = 80, rows = 24 } = this.#stderr;
    const width = Math.max(20, columns - 1);
    const most = Math.max(0, Math.min(12, rows - 2)); // a taller block would fill the scrollback
    const bars = progress.moving.slice(0, most).map((blob) => this.#dim(formatBar(blob, width)));
    const lines = [...bars, total.slice(0, width)];
    this.#clear();
    this.#stderr.write(lines.map((line) => `${line}\n`).join(""));
    this.#drawnLines = lines.length;
  }

  #dim(text: string): string {
    return this.#isDimmed ? `\u001b[2m${text}\u001b[22m` : text;
  }

  /** Up, to the line's start, and erase all below. */
  #clear(): void {
    if (this.#drawnLines > 0) this.#stderr.write(`\u001b[${this.#drawnLines}A\r\u001b[J`);
    this.#drawnLines = 0;
  }
}

// ------ Running it ------

async function readStdin({ stdin }: CommandIO, signal: AbortSignal): Promise<Buffer> {
  addAbortSignal(signal, stdin as Readable); // a wait for what is typed ends, too
  return Buffer.concat((await (stdin as Readable).toArray()) as Buffer[]);
}

/**
 * A password that is typed is not shown. Ctrl-C is no signal then, but a key: it ends the command
 * all the same.
 */
async function askPassword({ stdin, stderr }: CommandIO, signal: AbortSignal): Promise<string> {
  const terminal = load("node:readline/promises").createInterface({ input: stdin, terminal: true });
  let isInterrupted = false;
  terminal.once("SIGINT", () => {
    isInterrupted = true;
    terminal.close();
  });
  const isClosed = once(terminal, "close").then(() => ""); // by Ctrl-D

  stderr.write("Password: ");
  const typing = terminal.question("", { signal }).catch(() => "");
  const password = await Promise.race([typing, isClosed]);
  terminal.close();
  stderr.write("\n");
  if (!isInterrupted && !signal.aborted) return password;

  if (!signal.aborted) process.kill(process.pid, "SIGINT");
  await delay(1000, undefined, { signal }).catch(ignore); // until that has come
  return stopped();
}

/**
 * An empty one is a variable that is not set, or a file that is not there: the registry would only
 * say 401.
 */
async function readPassword(io: CommandIO, signal: AbortSignal): Promise<string> {
  const isTyped = io.stdin.isTTY === true;
  const given = isTyped ? await askPassword(io, signal) : String(await readStdin(io, signal));
  const password = given.replace(/\r?\n$/, "");
  if (password === "") usage("--password-stdin: there is no password on stdin");
  return password;
}

/**
 * The images of --from. What is not plain in a document is told, as a bundle without it fails on
 * the other side.
 */
async function readImageList(
  io: CommandIO,
  from: string | undefined,
  say: (text: string) => void,
  signal: AbortSignal,
): Promise<readonly string[]> {
  if (from === undefined) return [];
  const refuse = (error: unknown) => usage(`cannot read --from ${from}: ${diskWords(error)}`);
  const isTyped = from === "-" && io.stdin.isTTY === true;
  if (isTyped) say("--from -: type an IMAGE a line; Ctrl-D ends the list");
  const isStdin = from === "-";
  const content = isStdin ? await readStdin(io, signal) : await fs.readFile(from).catch(refuse);
  const { references, format, unread } = parseImageList(content);
  if (format === "lines") return references;

  if (references.length === 0) usage(`--from ${from}: there is no image: value in it`);
  const count = counted(references.length, "different image");
  const others = unread === 0 ? "" : `, ${counted(unread, "more value")} could not be read`;
  say(
    `${from}: ${count} in image: values${others}; images named elsewhere are not seen (arguments, custom resources)`,
  );
  return references;
}

/**
 * --parsed: what the command line says, in the library's words where it has them; no secret is
 * shown.
 */
function showCommand({ stdout }: CommandIO, { options, ...rest }: Command): void {
  const images = rest.images.map(withoutUser);
  const shown: Record<string, unknown> = { ...rest, ...options, images };
  for (const { option, isSecret } of OPTIONS) {
    if (isSecret && option && option in shown) shown[option] = "***";
  }
  stdout.write(`${JSON.stringify(shown, null, 2)}\n`);
}

async function printManifest(
  { stdout, stderr }: CommandIO,
  puller: Puller,
  type: "list" | "image",
): Promise<void> {
  const { bytes, digest, manifest } = await puller.pullManifest(type);
  stdout.write(stdout.isTTY ? `${JSON.stringify(manifest, null, 2)}\n` : bytes);
  stderr.write(`${digest}\n`);
}

/** `1 image, 8.3 MB in app.tar: 8.3 MB fetched, 1.2 s`; what is 0 and not news is left out. */
function formatSummary(report: PullReport, place: string, seconds: number): string {
  const { images, sizeBytes, fetchedBytes, reusedBytes, resumedBytes, isUnchanged } = report;
  const parts = [
    ...(isUnchanged ? ["unchanged"] : []),
    `${formatBytes(fetchedBytes)} fetched`,
    ...(reusedBytes > 0 && !isUnchanged ? [`${formatBytes(reusedBytes)} reused`] : []),
    ...(resumedBytes > 0 ? [`${formatBytes(resumedBytes)} resumed`] : []),
    `${seconds.toFixed(1)} s`,
  ];
  return `${counted(images.length, "image")}, ${formatBytes(sizeBytes)} in ${place}: ${parts.join(", ")}`;
}

/** What --dry-run says in its stead. */
function formatForecast(report: PullReport, place: string | undefined): string {
  const { images, sizeBytes, fetchedBytes, reusedBytes } = report;
  const size = `${formatBytes(sizeBytes)} ${place === undefined ? "in all" : `in ${place}`}`;
  const reused = reusedBytes > 0 ? `, ${formatBytes(reusedBytes)} to reuse` : "";
  return `dry run: ${counted(images.length, "image")}, ${size}: ${formatBytes(fetchedBytes)} to fetch${reused}`;
}

const isStdout = (destination: string | undefined): boolean =>
  destination === "-" || destination === "/dev/stdout";

const formatPlatformCount = ({ here, named }: { here: number; named: number }): string =>
  `${here} of ${counted(named, "platform")}`;

/** What --verify says of a tar in which all is right. */
function formatTarReport(report: TarReport, isSigned: boolean): string {
  const { images, blobs, unpackedLayers, baseLayers, notUnpacked, absentManifests, loaders } =
    report;
  const { here, named } = report.platforms;
  const others = absentManifests - (named - here);
  const counts = [
    counted(images.length, "image"),
    `${counted(blobs, "blob")} hashed`,
    `${counted(unpackedLayers, "layer")} unpacked`,
    ...(baseLayers > 0 ? [`${counted(baseLayers, "layer")} of the base`] : []),
    ...notUnpacked.map(({ reason, layers }) => `${layers} (${reason}) not`),
    ...(here < named ? [formatPlatformCount({ here, named })] : []),
    ...(others > 0 ? [`${others} more of an index not here`] : []),
  ];
  const taking = loaders.filter(({ takes }) => takes);
  const judgement = isSigned ? "all is right, and signed by a key given" : "all is right";
  const places = taking.map(formatLoader).join(", ") || "no program that is known here";
  const refusals = loaders.flatMap(formatRefusal);
  return [`${counts.join(", ")}: ${judgement}`, `loads in ${places}`, ...refusals].join("\n");
}

/** What keeps a program from a tar that is made for it; not that the tar is made for others. */
const FAULT_WORDS: Readonly<Partial<Record<LoaderFault["kind"], string>>> = {
  "bad-name": "has a name that is none, or that has no tag",
  "folder-name": "is a path that no image can be called after",
  compressed: "the tar is compressed as a whole",
  "rooted-names": "names begin with a slash",
  link: "is a link",
  "odd-entry": "is of a type, or has a name, that is not unpacked",
  "odd-link": "is a link that leads nowhere",
  windows: "is for Windows",
  "too-many-layers": `has more than ${MOST_DOCKER_LAYERS} layers`,
  encrypted: "is encrypted",
  "no-tar": "is no tar",
  "path-twice": "makes one of its paths twice, or where nothing is",
  "odd-path": "has a path that cannot be unpacked",
  "trailing-bytes": "has bytes after what is compressed",
  label: "is compressed, and its type says that it is not",
  packing: "is compressed in a way that cannot be checked here",
  "not-at-bottom": "stands on other layers in the base",
  "same-name": "has one name for several images",
};

function formatRefusal({ program, reasons }: TarLoader): string[] {
  const [telling] = reasons.filter(({ kind }) => kind in FAULT_WORDS);
  if (!telling) return [];
  const place = telling.path === undefined ? "" : `: ${telling.path}`;
  const words = `${telling.entry ?? ""} ${FAULT_WORDS[telling.kind]}${place}`;
  return [`not in ${program}: ${printable(words, 1000)}`];
}

function formatLoader({ program, needsName, sinceVersion }: TarLoader): string {
  const place = `${program === "skopeo oci" ? "FOLDER" : "FILE"}${needsName ? ":NAME" : ""}`;
  const words = program.startsWith("skopeo") ? `${program}:${place}` : program;
  return sinceVersion === undefined ? words : `${words} from ${sinceVersion} on`;
}

/** A table for a person. */
function formatTarImage(image: TarImage): string {
  const { name, digest, platform, sizeBytes, layers, platforms } = image;
  const rows = layers.map(({ digest: layer, size, present }) => {
    const amount = present ? formatBytes(size) : "absent";
    return `${amount.padStart(7)} ${layer}`;
  });
  const some = platforms ? `  (${formatPlatformCount(platforms)})` : "";
  const title = `${name || "(no name)"}  ${platform}  ${formatBytes(sizeBytes)}${some}`;
  return [title, ...(digest ? [`        ${digest}`] : []), ...rows].join("\n");
}

/** --list-tar and --verify of `-` read stdin. */
const tarSource = (io: CommandIO, file: string): TarSource =>
  file === "-" ? (io.stdin as Readable) : file;

/** --list-tar: a table for a person, a line of JSON for each image otherwise. */
async function showTarList(io: CommandIO, file: string, signal: AbortSignal): Promise<void> {
  const { stdout } = io;
  for (const image of await listTar(tarSource(io, file), { signal })) {
    const { isImage: _isImage, ...plain } = image;
    stdout.write(`${stdout.isTTY ? formatTarImage(image) : JSON.stringify(plain)}\n`);
  }
}

type TarCheckCommand = Readonly<{
  signal: AbortSignal;
  isQuiet: boolean;
  signedBy: readonly string[] | undefined;
  since: string | undefined;
}>;

/** --verify, with progress on a terminal. */
async function showTarReport(
  io: CommandIO,
  file: string,
  { signal, isQuiet, signedBy, since }: TarCheckCommand,
): Promise<void> {
  const display = new Display(io, isQuiet || !io.stderr.isTTY);
  const onProgress: LookOptions["onProgress"] = ({ doneBytes, totalBytes = doneBytes }) =>
    display.show({
      ...NO_PROGRESS,
      phase: "fetch",
      doneBytes,
      totalBytes,
      fetchedBytes: doneBytes,
    });
  try {
    const options = { signal, signedBy, since, onProgress };
    const report = await verifyTar(tarSource(io, file), options);
    display.stop();
    io.stdout.write(`${file}: ${formatTarReport(report, signedBy !== undefined)}\n`);
  } finally {
    display.stop();
  }
}

/**
 * The pull itself: stdout gets the tar, or one line for each image, pinned to the digest that DEST
 * now holds.
 */
async function pullForCommand(
  io: CommandIO,
  command: Command,
  references: readonly string[],
  options: PullOptions,
): Promise<void> {
  const { stdout } = io;
  const isLone = command.from === undefined && command.destination === undefined;
  const destination = isLone
    ? defaultDestination(parseReference(references[0] ?? ""))
    : command.destination;
  const isStream = isStdout(destination);
  const place = isStream ? "the stream" : (destination ?? "");
  const startedAtMs = performance.now();
  const display = new Display(io, command.isQuiet);
  try {
    const report = await pullImages(references, isStream ? stdout : destination, {
      ...options,
      onProgress: display.show,
      onWarning: display.say,
    });
    display.stop();
    if (options.dryRun || !isStream)
      stdout.write(report.images.map(({ pinned }) => `${pinned}\n`).join(""));
    if (command.isQuiet) return;
    const seconds = (performance.now() - startedAtMs) / 1000;
    if (options.dryRun) display.say(formatForecast(report, destination));
    else display.say(formatSummary(report, place, seconds));
  } finally {
    display.stop();
  }
}

async function runCommand(
  argv: readonly string[],
  io: CommandIO,
  signal: AbortSignal,
): Promise<void> {
  const { stdout, env: environment } = io;
  const line = parseCommandLine(argv);
  const [firstWord, ...moreWords] = line.positionals;
  if (line.switches.has("help") || firstWord === "help") {
    stdout.write(formatHelp());
    return;
  }
  if (line.switches.has("version") || (firstWord === "version" && moreWords.length === 0)) {
    stdout.write(`imgpull version: ${IMGPULL_VERSION} build date: ${IMGPULL_BUILD_DATE}\n`);
    return;
  }

  const command = planCommand(line);
  if (line.switches.has("parsed")) return showCommand(io, command);
  const { "list-tar": listed, verify: verified } = line.values;
  if (listed !== undefined) return showTarList(io, listed, signal);
  if (verified !== undefined) {
    const { isQuiet } = command;
    const { "signed-by": signedBy } = line.lists;
    const { since } = line.values;
    return showTarReport(io, verified, { signal, isQuiet, signedBy, since });
  }

  const { destination, manifest } = command;
  const { say } = new Display(io, true);
  const references = [...command.images, ...(await readImageList(io, command.from, say, signal))];
  if (references.length === 0) usage(`--from ${command.from}: there is no image in it`);
  if (destination !== undefined) await checkDestinationName(destination);
  if (stdout.isTTY && isStdout(destination))
    usage("the tar is not written to a terminal: redirect stdout");

  const options: PullOptions = { ...command.options, environment, signal };
  if (command.isPasswordOnStdin) options.password = await readPassword(io, signal);
  if (manifest === undefined) return pullForCommand(io, command, references, options);

  const puller = new Puller({ ...options, onWarning: say, url: references[0] ?? "" });
  return printManifest(io, puller, manifest);
}

/** SIGINT and SIGTERM stop what runs; asked twice, the system ends us at once. */
function listenForSignals(stop: AbortController) {
  let exitCode: number | undefined;
  const interrupt = (name: NodeJS.Signals) => {
    exitCode = name === "SIGINT" ? 130 : 143;
    stop.abort();
  };
  process.once("SIGINT", interrupt).once("SIGTERM", interrupt);
  return {
    exitCode: () => exitCode,
    close: () => process.off("SIGINT", interrupt).off("SIGTERM", interrupt),
  };
}

/**
 * A reader of stdout that has gone is no news; a full disk behind it is, unless it has been told
 * already.
 */
function watchOutput({ stdout, stderr }: CommandIO): void {
  for (const stream of [stdout, stderr]) stream.on("error", ignore);
  stdout.once("error", (error) => {
    if (errorCodeOf(error) === "EPIPE") return;
    process.once("beforeExit", () => {
      if (process.exitCode) return;
      process.exitCode = 1;
      stderr.write(`imgpull: cannot write stdout: ${diskWords(error)}\n`);
    });
  });
}

/** @internal Runs the command; resolves to its exit code: 0 done, 1 failed, 2 usage, 130 SIGINT, 143 SIGTERM. */
async function main(argv: readonly string[], io: CommandIO = process): Promise<number> {
  const stop = new AbortController();
  const signals = io === process ? listenForSignals(stop) : undefined;
  if (io === process) watchOutput(io);
  try {
    await runCommand(argv, io, stop.signal);
    return 0;
  } catch (error) {
    const signalCode = signals?.exitCode();
    if (signalCode !== undefined) return signalCode;
    if (!(error instanceof ImgpullError)) throw error;
    // remedies are indented
    const lines = inTypedWords(error.message).replace(/\n(?! )/g, "\nimgpull: ");
    io.stderr.write(`imgpull: ${lines}\n`);
    return error.code === "BAD_REFERENCE" || error.code === "BAD_OPTION" ? 2 : 1;
  } finally {
    signals?.close();
  }
}

// ====== 17. Exports ======
/** @internal for the tests */
const internals = Object.freeze({
  BlobState,
  EarlyRoom,
  Schedule,
  LIMITS,
  OPTIONS,
  Secrets,
  TUNING,
  defaultDestination,
  encodeTarHeader,
  formatReference,
  imageName,
  isCacheMiss,
  isExemptFromProxy,
  judge,
  matchPlatform,
  openTarFile,
  parseChallenges,
  parseManifest,
  parsePublicKey,
  parseReference,
  planTar,
  proxyFor,
  readSignature,
  readTar,
  pulledImage,
  runPull,
  verifyTar,
  wantedPlatform,
  withSession,
});

export type {
  BlobProgress,
  Descriptor,
  ErrorCode,
  ImageList,
  LoaderFault,
  LookOptions,
  ManifestHolder,
  OutputStream,
  Platform,
  Progress,
  PulledImage,
  PullerOpts,
  PullOptions,
  PullReport,
  PullResult,
  Reference,
  TarFile,
  TarImage,
  TarLayer,
  TarLoader,
  TarProblem,
  TarReader,
  TarReport,
  TarSource,
  VerifyOptions,
};
export {
  ImgpullError,
  internals,
  listTar,
  main,
  newPullerOpts,
  openTar,
  Puller,
  parseImageList,
  parseReference,
  pullImages,
  verifyTar,
};
