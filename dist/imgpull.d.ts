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
    onProgress?: ((progress: {
        doneBytes: number;
        totalBytes: number | undefined;
    }) => void) | undefined;
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
{
    kind: "unreadable";
    reason: string;
}
/** The blocks that end a tar are not there. */
 | {
    kind: "cut-off";
    atByte: number;
} | {
    kind: "too-many-entries";
} | {
    kind: "too-many-references";
}
/** Programs differ in which of two files they take, */
 | {
    kind: "name-twice";
    entry: string;
}
/** in what `..` in a name leads to, */
 | {
    kind: "step-up";
    entry: string;
}
/** and in what lies below a link or a file. */
 | {
    kind: "below-no-folder";
    entry: string;
}
/** The bytes have another digest than the name says. */
 | {
    kind: "damaged";
    entry: string;
} | {
    kind: "missing";
    entry: string;
} | {
    kind: "size";
    entry: string;
    expectedBytes: number;
    actualBytes: number;
}
/** A manifest, index or config that is not what it should be. */
 | {
    kind: "document" | "malformed";
    entry: string;
    reason: string;
}
/** An index of which no manifest is here. */
 | {
    kind: "nothing-here";
    entry: string;
}
/** A config that has not one diff_id for each layer. */
 | {
    kind: "diff-ids";
    entry: string;
}
/** A layer that does not unpack to the diff_id that the config has for it. */
 | {
    kind: "diff-id";
    entry: string;
    diffId: string;
} | {
    kind: "unpacks-without-end";
    entry: string;
} | {
    kind: "no-image";
};
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
    platforms?: {
        here: number;
        named: number;
    };
}
/** Why a program does not load a tar. `entry` is the name of a file in it. */
interface LoaderFault {
    kind: "no-manifest-json" | "no-layout"
    /** The tar as a whole: this program wants it plain. */
     | "compressed"
    /** Of its images one at least has no name by which this program finds it. */
     | "no-name" | "several" | "bad-name"
    /** podman calls the image of a folder after the folder's path. */
     | "folder-name" | "same-name"
    /** A delta's base has the layer, but not on top of the same ones. */
     | "not-at-bottom" | "no-image" | "nested-index" | "partial-index" | "rooted-names" | "link"
    /** It unpacks the tar first, and fails at an entry that it cannot make a file of. */
     | "odd-entry" | "odd-link" | "windows" | "too-many-layers" | "encrypted" | "no-tar"
    /** A layer has a path twice, or below a link to nothing: docker and podman refuse that, */
     | "path-twice"
    /** or one that cannot be unpacked, such as that of a file below a file. */
     | "odd-path" | "trailing-bytes" | "label" | "packing";
    entry?: string;
    /** Where it lies in that layer. */
    path?: string;
}
/** Whether a program loads a tar. */
interface TarLoader {
    /** The last one is of folders. */
    program: "docker" | "podman" | "ctr" | "skopeo docker-archive" | "skopeo oci-archive" | "skopeo oci";
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
    notUnpacked: {
        reason: string;
        layers: number;
    }[];
    /** Of the indexes that are here: how many of the platforms they name are here too. */
    platforms: {
        here: number;
        named: number;
    };
    /**
     * Manifests of these indexes that are not here: platforms that were left out, and their
     * attestations.
     */
    absentManifests: number;
    loaders: TarLoader[];
    problems: TarProblem[];
}
/** What went wrong, for programs: the `code` of an `ImgpullError`. */
type ErrorCode = "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM" | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "SIGNATURE" | "PROTOCOL" | "NETWORK" | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";
/** The only error thrown on purpose; anything else is a bug. */
declare class ImgpullError extends Error {
    readonly name = "ImgpullError";
    readonly code: ErrorCode;
    /** The HTTP status, where there was one. */
    readonly status?: number;
    /**
     * What is wrong with a tar, as values, and what is right with it: of `verifyTar()`, with the code
     * `BAD_TAR`.
     */
    readonly report?: TarReport;
    constructor(code: ErrorCode, message: string, details?: {
        status?: number | undefined;
        cause?: unknown;
    });
}
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
/**
 * Throws BAD_REFERENCE with the reason; nothing is asked of any registry for a reference that
 * cannot be right.
 */
declare function parseReference(text: string): Reference;
/** The images that a list names: one a line; or the `image:` values of a YAML or JSON document. */
interface ImageList {
    /** As they are written, each once. */
    references: readonly string[];
    format: "lines" | "yaml" | "json";
    /** How many `image:` values could not be read: anchors, aliases, text over several lines. */
    unread: number;
}
/**
 * Reads a list of images: lines, with `#` before comments; or YAML or JSON as Kubernetes, Compose
 * and `helm template` have it, of which each `image:` value is taken.
 */
declare function parseImageList(content: string | Uint8Array): ImageList;
/**
 * Pulls images into one tar, folder or stream: `dest` is a file's path, a folder's (one that
 * exists, or a path that ends in `/`: an OCI image layout, to which is added), or a Writable, which
 * gets the tar in order and is not ended. Only with `dryRun` it may be undefined. Throws
 * ImgpullError: BAD_REFERENCE and BAD_OPTION before anything is asked for.
 */
declare function pullImages(references: readonly string[], dest: string | OutputStream | undefined, options?: PullOptions): Promise<PullReport>;
/** https, this system's platform. */
declare function newPullerOpts(url: string): PullerOpts;
/** One image. Its constructor throws BAD_REFERENCE and BAD_OPTION, its methods the rest. */
declare class Puller {
    #private;
    constructor(urlOrOpts: string | PullerOpts);
    getUrl(): string;
    /** The options, with the defaults in place of what was left out. */
    getOpts(): PullerOpts;
    /**
     * Leaves a verified tar at `dest`, or adds to the OCI layout there where that is a directory or
     * ends in "/".
     */
    pullTar(dest: string | OutputStream): Promise<PullResult>;
    /**
     * The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no
     * index for it.
     */
    pullManifest(type: "list" | "image"): Promise<ManifestHolder>;
    /** Whatever the registry has under the reference: an index or an image manifest. */
    getManifest(): Promise<ManifestHolder>;
    /**
     * The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something
     * out.
     */
    headManifest(): Promise<{
        mediaType: string;
        digest: string;
        size: number;
    }>;
    /**
     * Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept.
     */
    pullBlobs(holder: ManifestHolder, dir: string): Promise<void>;
}
/**
 * What a tar holds, without a look at its bytes. Throws BAD_TAR where that cannot be read from it.
 */
declare function listTar(source: TarSource, options?: LookOptions): Promise<TarImage[]>;
/**
 * Hashes every blob, looks for every reference, unpacks every layer. Throws BAD_TAR with all that
 * is wrong: in words, and as values in the error's `report`. SIGNATURE where all is right, but not
 * signed.
 */
declare function verifyTar(source: TarSource, options?: VerifyOptions): Promise<TarReport>;
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
declare class TarReader {
    #private;
    /** All files in order. A stream, or a compressed tar, can be gone through once. */
    files(): AsyncGenerator<TarFile>;
    /**
     * The bytes of a blob, which end in DIGEST_MISMATCH where they are wrong. Looks through `files()`
     * for it.
     */
    blob(digest: string): AsyncGenerator<Uint8Array>;
    /** Lets go of the file or the stream. */
    close(): Promise<void>;
}
/** Opens a tar or an OCI layout folder, to read what is in it. To be closed. */
declare function openTar(source: TarSource, options?: LookOptions): Promise<TarReader>;
export type { BlobProgress, Descriptor, ErrorCode, ImageList, LoaderFault, LookOptions, ManifestHolder, OutputStream, Platform, Progress, PulledImage, PullerOpts, PullOptions, PullReport, PullResult, Reference, TarFile, TarImage, TarLayer, TarLoader, TarProblem, TarReader, TarReport, TarSource, VerifyOptions, };
export { ImgpullError, listTar, newPullerOpts, openTar, Puller, parseImageList, parseReference, pullImages, verifyTar,  };
