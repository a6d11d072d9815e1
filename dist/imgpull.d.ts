/** An operating system and processor in Go's words: `{ os: "linux", architecture: "arm", variant: "v7" }`. */
interface Platform {
    os: string;
    architecture: string;
    variant?: string;
}
/** A content descriptor, OCI image specification, descriptor.md. `size` is in bytes. */
interface Descriptor {
    mediaType: string;
    digest: string;
    size: number;
    urls?: string[];
    platform?: Platform;
    annotations?: Record<string, string>;
}
/** What to pull and how. Only `url` is required; the rest has the command's defaults (SPEC §1, §9). */
interface PullerOpts {
    /** The image reference: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. */
    url: string;
    scheme?: "https" | "http";
    /** Platform wanted, in Go's words; the default is this machine's. */
    osType?: string;
    archType?: string;
    variant?: string;
    username?: string;
    password?: string;
    /** An outside token (ECR's), sent as `Authorization: Basic TOKEN`. */
    token?: string;
    /** Paths of PEM files: client certificate and key, and additional certificate authorities. */
    tlsCert?: string;
    tlsKey?: string;
    caCert?: string;
    /** Does not verify the server's certificate. */
    insecure?: boolean;
    /** The upstream registry that a mirror stands for: `?ns=HOST`. */
    namespace?: string;
    /** Connections used at once; default 8, at most 64. */
    concurrency?: number;
    /** Attempts after the first; default 5. */
    retries?: number;
    /** How long a connection may be silent, in milliseconds; default 30000. */
    timeoutMs?: number;
    signal?: AbortSignal;
    onProgress?: (progress: Progress) => void;
    /** One line each: a retry, a fallback, a layer that some loaders refuse. */
    onWarning?: (message: string) => void;
}
/** Bytes are of blobs, before any tar header; `doneBytes` never falls, and equals `totalBytes` at the end. */
interface Progress {
    phase: "resolve" | "fetch" | "finish";
    doneBytes: number;
    totalBytes: number;
    blobsDone: number;
    blobsTotal: number;
}
/** What DEST now holds. `digest` is the manifest's (the index's when every platform was asked for). */
interface PullResult {
    name: string;
    digest: string;
    /** `os/architecture[/variant]`, `all`, or the empty string for what is not an image. */
    platform: string;
    layers: number;
    /** Size of DEST: of the tar, or of the blobs put into a directory. */
    sizeBytes: number;
    /** What came over the line as blobs; the rest was there already. */
    fetchedBytes: number;
}
/** A manifest as the registry sent it. `bytes` has the digest; `manifest` is the parsed JSON. */
interface ManifestHolder {
    mediaType: string;
    digest: string;
    bytes: Uint8Array;
    manifest: unknown;
    imageUrl: string;
}
type ErrorCode = "BAD_REFERENCE" | "BAD_OPTION" | "NOT_FOUND" | "UNAUTHORIZED" | "FORBIDDEN" | "RATE_LIMITED" | "NO_PLATFORM" | "NOT_AN_IMAGE" | "UNSUPPORTED" | "TOO_LARGE" | "DIGEST_MISMATCH" | "SIZE_MISMATCH" | "PROTOCOL" | "NETWORK" | "TIMEOUT" | "TLS" | "CREDENTIALS" | "PROXY" | "DISK" | "BAD_TAR" | "ABORTED";
/** The only error thrown on purpose; anything else is a bug. `status` is the HTTP status, where there was one. */
declare class ImgpullError extends Error {
    readonly name = "ImgpullError";
    readonly code: ErrorCode;
    readonly status?: number;
    constructor(code: ErrorCode, message: string, details?: {
        status?: number | undefined;
        cause?: unknown;
    });
}
type Environment = Readonly<Record<string, string | undefined>>;
/** https, this system's platform. */
declare function newPullerOpts(url: string): PullerOpts;
/** Pulls one image. Throws ImgpullError: BAD_REFERENCE and BAD_OPTION at once, the rest from its methods. */
declare class Puller {
    #private;
    constructor(urlOrOpts: string | PullerOpts);
    getUrl(): string;
    getOpts(): PullerOpts;
    /** Leaves a verified tar at `dest`, or adds to the OCI image layout there where that is a directory or ends in "/". */
    pullTar(dest: string): Promise<PullResult>;
    /** The index ("list") or the platform's manifest ("image"). NOT_FOUND where the registry has no index for it. */
    pullManifest(type: "list" | "image"): Promise<ManifestHolder>;
    /** Whatever the registry has under the reference: an index or an image manifest. */
    getManifest(): Promise<ManifestHolder>;
    /** The manifest's descriptor by a HEAD request; by its bytes where the registry leaves something out. */
    headManifest(): Promise<{
        mediaType: string;
        digest: string;
        size: number;
    }>;
    /** Every blob of an image manifest as `dir/HEX`, verified; those that are there already are kept. */
    pullBlobs(holder: ManifestHolder, dir: string): Promise<void>;
}
/** The streams that a command runs with; tests give their own. */
interface CommandIO {
    readonly stdin: NodeJS.ReadableStream;
    readonly stdout: NodeJS.WritableStream & {
        isTTY?: boolean;
    };
    readonly stderr: NodeJS.WritableStream & {
        isTTY?: boolean;
        columns?: number;
    };
    readonly environment: Environment;
}
/** Runs the command; resolves to its exit code: 0 done, 1 failed, 2 usage, 130 SIGINT, 143 SIGTERM. */
declare function main(argv: readonly string[], io?: CommandIO): Promise<number>;
export { ImgpullError, Puller, internals, main, newPullerOpts };
export type { Descriptor, ErrorCode, ManifestHolder, Platform, Progress, PullerOpts, PullResult };
