//! Text completions of a sparse model over HTTP, with the route of OpenAI's completions: an example of a program on the
//! crates, not a product.
//!
//! ```text
//! dsmoe-serve MODEL [--port 8080] [--batch 8] [--queue 64] [--dtype bf16|f32]
//! curl localhost:8080/v1/completions -d '{"prompt": "A list is", "max_tokens": 20, "stream": true, "active": 0.375}'
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use dsmoe_core::Inference;
use dsmoe_datasets::Tokenizer;
use dsmoe_kernels::Precision;
use dsmoe_serve::{Limits, http, start};

struct Args {
    model: PathBuf,
    port: u16,
    precision: Precision,
    limits: Limits,
}

fn args(mut words: impl Iterator<Item = String>) -> Result<Args> {
    const USAGE: &str = "usage: dsmoe-serve MODEL [--port 8080] [--batch 8] [--queue 64] [--dtype bf16|f32]";
    let mut args =
        Args { model: PathBuf::new(), port: 8080, precision: Precision::Bf16, limits: Limits::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value; {USAGE}"));
        match word.as_str() {
            "--port" => args.port = value()?.parse().context("--port")?,
            "--batch" => args.limits.batch = value()?.parse().context("--batch")?,
            "--queue" => args.limits.queue = value()?.parse().context("--queue")?,
            "--dtype" => {
                args.precision = match value()?.as_str() {
                    "bf16" => Precision::Bf16,
                    "f32" => Precision::F32,
                    other => bail!("--dtype {other}: use bf16 or f32"),
                }
            }
            _ if args.model.as_os_str().is_empty() && !word.starts_with('-') => args.model = word.into(),
            _ => bail!("unexpected {word}; {USAGE}"),
        }
    }
    if args.model.as_os_str().is_empty() {
        bail!("{USAGE}");
    }
    Ok(args)
}

fn serve() -> Result<()> {
    let args = args(std::env::args().skip(1))?;
    let model = Inference::load(&args.model, args.precision)?;
    let config = model.config();
    let tokenizer = Tokenizer::load(&args.model, config.bos_token_id, config.vocab_size)?;
    let name = args.model.file_name().map_or_else(|| "model".to_owned(), |name| name.display().to_string());
    let engine = start(model, tokenizer, args.limits)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", args.port)).await?;
        eprintln!("listening on http://{}/v1/completions", listener.local_addr()?);
        let stop = async {
            // Without a handler of the signal the server ends with the process.
            let _ = tokio::signal::ctrl_c().await;
        };
        axum::serve(listener, http::router(engine, name)).with_graceful_shutdown(stop).await?;
        Ok(())
    })
}

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dsmoe-serve: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
