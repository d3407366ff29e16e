//! Inference on a GPU: scores windows of text, and decodes with a cache.

pub(crate) mod acts;
mod build;
pub(crate) mod cache;
mod forward;
mod weights;

use dsmoe_kernels::cuda::ops::{attention, cross_entropy, elementwise};
use dsmoe_router::RoutingStats;
use half::bf16;
pub(crate) use weights::CudaInference;

use self::acts::{Acts, LOGIT_ROWS};
use self::cache::{CudaCache, Step};
use self::forward::Attend;
use super::cache::Cache;
use super::cpu::Workspace;
use super::segments::{Likelihood, Place};
use crate::error::Result;
use crate::model::gpu::turns::Stretch;
use crate::model::tensors::Batch;

impl Stretch {
    fn of(place: &Place) -> Stretch {
        let before = place.before.1;
        Stretch { rows: before..before + place.tokens, positions: place.positions }
    }
}

impl CudaInference {
    /// Sets `losses` to those of the targets, and adds the routing to `stats`.
    pub(crate) fn score(
        &self,
        losses: &mut [f32],
        batch: Batch<'_>,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Batch { inputs, targets, seq } = batch;
        let (gpu, tokens) = (&self.gpu, inputs.len());
        let acts = self.acts(workspace, tokens)?;
        acts.start(self, inputs, stats.as_deref())?;
        // The last target is part of the text, although it is not read.
        let angles = self.turns.of_pass(gpu, &[Stretch { rows: 0..seq, positions: seq + 1 }])?;
        self.forward(acts, tokens, Attend::Sequences(seq), &angles)?;
        let targets = gpu.upload(targets)?;
        let mut found = gpu.zeros::<f32>(tokens)?;
        for first in (0..tokens).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(tokens);
            let mut logits = acts.logits.part_mut(0..rows.len());
            self.head(&mut logits, &acts.h.part(rows.clone()))?;
            let (losses, targets) = (&mut found.part_mut(rows.clone()), &targets.part(rows));
            cross_entropy::Forward { losses, logits: &logits, targets }.run()?;
        }
        found.download_to(losses)?;
        acts.ffn.report(self, stats)
    }

    /// Feeds `ids` at the cache's next positions. Sets the workspace's logits to those after the last `last` of them.
    pub(crate) fn logits(
        &self,
        ids: &[u32],
        last: usize,
        cache: &mut Cache,
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (start, vocab) = (cache.len, self.config.vocab_size);
        let stretch = Stretch { rows: start..start + ids.len(), positions: cache.positions(ids.len()) };
        let held = self.cache(cache, start + ids.len())?;
        if let [id] = ids {
            self.step(*id, held, &stretch)?;
            workspace.logits.resize(vocab);
            let acts = &held.step.work.acts;
            acts.logits.part(0..1).download_to(&mut workspace.logits)?;
            acts.ffn.report(self, stats)?;
        } else {
            let acts = self.acts(workspace, ids.len())?;
            acts.start(self, ids, stats.as_deref())?;
            let layers = &mut held.step.work.layers;
            let angles = self.turns.of_pass(&self.gpu, &[stretch])?;
            self.forward(acts, ids.len(), Attend::Continue(layers, start), &angles)?;
            let mut logits = vec![0.0; last * vocab];
            let firsts = (ids.len() - last..).step_by(LOGIT_ROWS);
            for (piece, first) in logits.chunks_mut(LOGIT_ROWS * vocab).zip(firsts) {
                let rows = piece.len() / vocab;
                let mut found = acts.logits.part_mut(0..rows);
                self.head(&mut found, &acts.h.part(first..first + rows))?;
                found.download_to(piece)?;
            }
            acts.ffn.report(self, stats)?;
            workspace.logits.resize(logits.len());
            workspace.logits.copy_from_slice(&logits);
        }
        cache.len += ids.len();
        Ok(())
    }

    /// Sets the workspace's logits to those after each of `ids`, at the next position of its cache.
    pub(crate) fn decode_each(
        &self,
        ids: &[u32],
        caches: &mut [&mut Cache],
        mut stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let vocab = self.config.vocab_size;
        // All are queued before the first download waits.
        for (&id, cache) in ids.iter().zip(&mut *caches) {
            let stretch = Stretch { rows: cache.len..cache.len + 1, positions: cache.positions(1) };
            let held = self.cache(cache, stretch.rows.end)?;
            self.step(id, held, &stretch)?;
        }
        workspace.logits.resize(ids.len() * vocab);
        for (logits, cache) in workspace.logits.chunks_exact_mut(vocab).zip(caches) {
            let start = cache.len;
            let acts = &self.cache(cache, start + 1)?.step.work.acts;
            acts.logits.part(0..1).download_to(logits)?;
            acts.ffn.report(self, stats.as_deref_mut())?;
        }
        Ok(())
    }

    /// Returns how likely each of `targets` (place, token) is after the ids up to its place.
    pub(crate) fn likelihoods(
        &self,
        ids: &[u32],
        places: &[Place],
        targets: &[(usize, u32)],
        stats: Option<&mut RoutingStats>,
        workspace: &mut Workspace,
    ) -> Result<Vec<Likelihood>> {
        let gpu = &self.gpu;
        let table: Vec<[usize; 4]> =
            places.iter().map(|place| [place.first, place.tokens, place.before.0, place.before.1]).collect();
        let segments = attention::Segments::new(gpu, &table)?;
        let stretches: Vec<Stretch> = places.iter().map(Stretch::of).collect();
        let angles = self.turns.of_pass(gpu, &stretches)?;
        let positions: Vec<u32> =
            stretches.into_iter().flat_map(|stretch| stretch.rows).map(|p| p as u32).collect();
        let positions = gpu.upload(&positions)?;
        let acts = self.acts(workspace, ids.len())?;
        acts.start(self, ids, stats.as_deref())?;
        self.forward(acts, ids.len(), Attend::Ragged(&segments, &positions), &angles)?;

        // Targets of one place share its row of logits.
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|&i| targets[i].0);
        let groups: Vec<&[usize]> = order.chunk_by(|&i, &j| targets[i].0 == targets[j].0).collect();
        let mut found = vec![Likelihood::default(); targets.len()];
        let mut states = gpu.zero_rows::<bf16>(LOGIT_ROWS.min(groups.len()), self.config.hidden)?;
        for groups in groups.chunks(LOGIT_ROWS) {
            let picked: Vec<u32> = groups.iter().map(|group| targets[group[0]].0 as u32).collect();
            let picked = gpu.upload(&picked)?;
            let mut states = states.part_mut(0..groups.len());
            elementwise::Rows { out: &mut states, x: &acts.h, picked: &picked }.run()?;
            let mut logits = acts.logits.part_mut(0..groups.len());
            self.head(&mut logits, &states)?;
            let here: Vec<usize> = groups.iter().copied().flatten().copied().collect();
            let rows: Vec<u32> = groups
                .iter()
                .enumerate()
                .flat_map(|(row, group)| group.iter().map(move |_| row as u32))
                .collect();
            let tokens: Vec<u32> = here.iter().map(|&i| targets[i].1).collect();
            let (rows, targets) = (&gpu.upload(&rows)?, &gpu.upload(&tokens)?);
            let (mut logs, mut greedy) = (gpu.zeros::<f32>(here.len())?, gpu.zeros::<u32>(here.len())?);
            let (of, chosen) = (&mut logs, &mut greedy);
            cross_entropy::Likelihoods { found: of, greedy: chosen, logits: &logits, rows, targets }.run()?;
            let results = logs.download()?.into_iter().zip(greedy.download()?);
            for (&i, (log_probability, greedy)) in here.iter().zip(results) {
                found[i] = Likelihood { log_probability, greedy: greedy != 0 };
            }
        }
        acts.ffn.report(self, stats)?;
        Ok(found)
    }

    /// Feeds `id` at the next position of `held`. The step's activations then hold the logits.
    fn step(&self, id: u32, held: &mut CudaCache, stretch: &Stretch) -> Result<()> {
        held.step.work.acts.ids.part_mut(0..1).upload_from(&[id])?;
        held.step.work.length.upload_from(&[stretch.rows.start as u32])?;
        self.turns.update(&mut held.step.work.angles, stretch)?;
        let pass = |step: &mut Step| {
            let Step { layers, length, partials, angles, acts } = step;
            acts.ffn.clear_counts()?;
            self.forward(acts, 1, Attend::Next(layers, length, partials), angles)?;
            self.head(&mut acts.logits.part_mut(0..1), &acts.h.part(0..1))
        };
        // Ops between which the host computes cannot be recorded.
        if self.is_hosted() { pass(&mut held.step.work) } else { held.step.run(&self.gpu, pass) }
    }

    /// Returns the activations of `workspace`, with room for `tokens`.
    fn acts<'w>(&self, workspace: &'w mut Workspace, tokens: usize) -> Result<&'w mut Acts> {
        workspace.cuda.get_or_insert_default().acts(self, tokens)
    }

    /// Returns the cache of a sequence that grows to `positions`.
    fn cache<'c>(&self, cache: &'c mut Cache, positions: usize) -> Result<&'c mut CudaCache> {
        let most = self.config.max_position;
        let (room, held) = (cache.room, &mut cache.cuda);
        match held {
            Some(held) if positions > held.room => held.grow(self, positions.max(2 * held.room).min(most))?,
            _ => {}
        }
        match held {
            Some(held) => Ok(held),
            empty => Ok(empty.insert(Box::new(CudaCache::new(self, positions.max(room).min(most))?))),
        }
    }
}
